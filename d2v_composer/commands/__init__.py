"""The d2v commands. The module of a command has a function ``main(argv)``."""

import d2v_composer.system.machine  # noqa: F401  (before any of them imports torch)
