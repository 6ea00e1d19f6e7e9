"""Read a running run's newest checkpoint through its pointer."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import fetch, is_remote

__all__ = ["LATEST", "fetch_model", "read_newest"]

LATEST = "latest-rank0.pt"

ReadT = TypeVar("ReadT")

# Composer removes a pointer before it writes the next one.
POINTER_ATTEMPTS, POINTER_PAUSE = 20, 0.05
# A reader may be too late for a checkpoint this often; each time the run has saved a newer one.
READ_ATTEMPTS = 5


def read_newest(path: Path, read: Callable[[Path], ReadT]) -> ReadT:
    """Read a file or a pointer's target; retry if the run has meanwhile saved another checkpoint and removed this one.

    Args:
        path: The file, or a run's pointer.
        read: Called with the file.

    Raises:
        InputError, OSError: ``read``'s, of a file that is still the newest.
    """
    for _ in range(READ_ATTEMPTS - 1):
        file = _target(path)
        try:
            return read(file)
        except (InputError, OSError):
            if file == path or _target(path) == file:
                raise
    return read(_target(path))


def _target(path: Path) -> Path:
    for _ in range(POINTER_ATTEMPTS):
        with suppress(OSError):
            return path.resolve(strict=True)
        time.sleep(POINTER_PAUSE)
    return path


def fetch_model(path: str | Path) -> Path:
    """Return a local path as :func:`fetch`, and say what to name instead of a run's folder or a YAML."""
    if not is_remote(path) and (newest := Path(path) / LATEST).exists():
        raise InputError(f"{path}: is the folder of a run, not a model's file; its newest checkpoint is {newest}")
    if str(path).endswith((".yaml", ".yml")):
        raise InputError(f"{path}: is a YAML, expected the file of a model")
    return fetch(path)
