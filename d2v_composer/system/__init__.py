"""The machine: files, locks, stores, processes and nodes. Nothing here knows of models or training."""
