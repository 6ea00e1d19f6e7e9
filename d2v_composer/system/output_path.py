"""Files that a command is to write, looked at before its work begins."""

import os
from pathlib import Path

from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import is_remote

__all__ = ["check_out_file"]


def check_out_file(path: Path) -> None:
    """Make sure that there can be such a file; its folder is made by who writes it.

    Raises:
        InputError: It is a folder, in a store, below a file, or in a folder that may not be written.
    """
    # A path has lost one of the slashes.
    if is_remote(str(path).replace(":/", "://", 1)):
        raise InputError(f"{path}: must be a file of this machine, not in a store")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a file to write")
    existing = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = "is not one that can be written" if existing.is_dir() else "is not a folder"
        raise InputError(f"{path}: cannot be written: {existing} {what}")
