"""Check the ZIP archive of a PyTorch file before torch reads it, since anyone may have made it."""

import tarfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from d2v_composer.system.retry import reason

__all__ = ["BrokenArchiveError", "check_archive"]

DIRECTORY = 0x10  # a bit of a ZIP entry's attributes


class BrokenArchiveError(ValueError):
    """An archive with a corrupt directory, or one in which its readers find different files."""


def check_archive(path: Path) -> dict[str, int] | None:
    """Refuse programs and archives that torch.save does not write.

    Returns:
        Key → bytes of each storage; ``None`` for a file that is not an archive.

    Raises:
        BrokenArchiveError: The directory is corrupt.
        ValueError: It is a TorchScript archive, expands to far more bytes, or is a tar archive, whose members torch
            would write to the disk.
    """
    if tarfile.is_tarfile(path):
        raise ValueError("a tar archive, which torch has not written since version 0.1")
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # as torch.load decides
            return None
    # Ask torch's own reader: what it sees as a program is one, whatever zipfile finds.
    records = _records(path)
    if "constants.pkl" in records:
        raise ValueError("a TorchScript archive, which is a program")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.external_attr & DIRECTORY and entry.file_size for entry in entries):
        raise BrokenArchiveError("an archive with a folder that has content")  # torch returns uninitialized memory
    sizes = {entry.filename: entry.file_size for entry in entries}
    found = {name.partition("/")[2].casefold() for name in sizes}
    if found != {name.casefold() for name in records} or len(found) != len(records):
        raise BrokenArchiveError("an archive with several files of one name")
    num_bytes = sum(sizes.values())
    if num_bytes > 2 * path.stat().st_size + (1 << 20):
        raise ValueError(f"an archive that expands to {num_bytes} bytes")
    return {name.rpartition("/data/")[2]: size for name, size in sizes.items() if "/data/" in name}


def _records(path: Path) -> list[str]:
    """Return the names of the files that torch finds in an archive."""
    try:
        reader: Any = torch._C.PyTorchFileReader(str(path))
        return reader.get_all_records()
    except UnicodeDecodeError as error:
        raise BrokenArchiveError(reason(error)) from error
    except RuntimeError as error:
        if "failed reading zip archive" in str(error):  # other errors mean another program's archive
            raise BrokenArchiveError(reason(error)) from error
        raise
