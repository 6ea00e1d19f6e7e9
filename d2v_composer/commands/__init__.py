"""What d2v runs: one command a module, each with ``main(argv)``. They need no checkout of the repository."""
