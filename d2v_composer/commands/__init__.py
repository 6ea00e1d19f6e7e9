"""The d2v commands, one per module, each with ``main(argv)``. They need no clone of the repository."""

import d2v_composer.system.machine  # noqa: F401  (before any of them imports torch)
