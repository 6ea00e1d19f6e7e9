"""What d2v runs: one command a module, each with ``main(argv)``. They need no checkout of the repository."""

import d2v_composer.system.cpu_threads  # noqa: F401  (before any of them imports torch)
