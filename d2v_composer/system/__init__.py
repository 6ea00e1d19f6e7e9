"""Use the machine: files, locks, stores, processes and nodes. Nothing here depends on models or training."""
