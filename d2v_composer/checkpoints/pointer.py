"""A run's pointer to its newest checkpoint, read while the run goes on."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from d2v_composer.system.errors import InputError

__all__ = ["read_newest"]

ReadT = TypeVar("ReadT")

# Composer removes a pointer before it makes the next one.
POINTER_ATTEMPTS, POINTER_PAUSE = 20, 0.05
# How often a reader may come too late for a checkpoint; each time the run has saved another one.
READ_ATTEMPTS = 5


def read_newest(path: Path, read: Callable[[Path], ReadT]) -> ReadT:
    """Read a file, or the one that a pointer names: anew, where the run has saved another one and removed this.

    Args:
        path: The file, or a run's pointer.
        read: Called with the file.

    Raises:
        InputError, OSError: ``read``'s, of a file that is still the newest.
    """
    for _ in range(READ_ATTEMPTS - 1):
        file = _pointed_at(path)
        try:
            return read(file)
        except (InputError, OSError):
            if file == path or _pointed_at(path) == file:
                raise
    return read(_pointed_at(path))


def _pointed_at(path: Path) -> Path:
    """The file that a pointer names. It may name another one soon, and for a moment in between there is none."""
    for _ in range(POINTER_ATTEMPTS):
        with suppress(OSError):
            return path.resolve(strict=True)
        time.sleep(POINTER_PAUSE)
    return path
