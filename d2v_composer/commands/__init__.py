"""The commands of d2v, one a module, each with ``main(argv)``. They need no checkout of the repository."""

import d2v_composer.system.cpu_threads  # noqa: F401  (before any of them imports torch)
