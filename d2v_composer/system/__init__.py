"""Use files, locks, object stores, processes and nodes; report errors and progress."""
