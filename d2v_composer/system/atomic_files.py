"""Local files that are there whole, or as they were."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["existing_folder", "whole_file", "write_atomically"]


def existing_folder(folder: Path) -> Path:
    """A folder, or the nearest one above it that exists."""
    return next(each for each in (folder, *folder.absolute().parents) if each.is_dir())


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to be written, which is on the disk and in its place when the block ends, or as it was before."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Write a file whose folder exists; a reader, and whoever comes after a kill, never sees half of it."""
    with whole_file(path) as file:
        file.write(contents.encode() if isinstance(contents, str) else contents)
