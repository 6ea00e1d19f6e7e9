"""The machine: files, locks, stores, processes and nodes. Independent of models and training."""
