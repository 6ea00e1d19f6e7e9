"""Use the machine: files, locks, stores, processes and nodes."""
