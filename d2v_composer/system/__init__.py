"""Use files, locks, stores, processes and nodes; report errors and progress."""
