"""The archive that a PyTorch file is, looked at before torch reads it: a stranger may have made it."""

import tarfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from d2v_composer.system.retry import reason

__all__ = ["BrokenArchiveError", "check_archive"]

DIRECTORY = 0x10  # among a ZIP entry's attributes


class BrokenArchiveError(ValueError):
    """An archive whose directory is damaged, or that its readers do not find the same files in."""


def check_archive(path: Path) -> dict[str, int] | None:
    """Refuse a program, and what is not stored as torch.save stores it.

    Returns:
        The sizes of its storages, by key, in bytes; ``None`` for a file that is no archive.

    Raises:
        BrokenArchiveError: Its directory is damaged.
        ValueError: The file is a TorchScript archive, one of few bytes that become many, or a tar archive, of which
            torch would write to the disk whatever it holds.
    """
    if tarfile.is_tarfile(path):
        raise ValueError("a tar archive, as no torch of this decade writes")
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # as torch.load tells
            return None
    # torch's own reader as well: what it takes for a program is one, whatever others find in the file.
    records = _records(path)
    if "constants.pkl" in records:
        raise ValueError("a TorchScript archive, which is a program")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.external_attr & DIRECTORY and entry.file_size for entry in entries):
        # torch would give whatever is in memory for its content.
        raise BrokenArchiveError("an archive with a folder that has content")
    sizes = {entry.filename: entry.file_size for entry in entries}
    found = {name.partition("/")[2].casefold() for name in sizes}
    if found != {name.casefold() for name in records} or len(found) != len(records):
        raise BrokenArchiveError("an archive with several files of one name")
    num_bytes = sum(sizes.values())
    if num_bytes > 2 * path.stat().st_size + (1 << 20):
        raise ValueError(f"its parts come to {num_bytes} bytes")
    return {name.rpartition("/data/")[2]: size for name, size in sizes.items() if "/data/" in name}


def _records(path: Path) -> list[str]:
    """The names of the files that torch finds in an archive."""
    try:
        reader: Any = torch._C.PyTorchFileReader(str(path))
        return reader.get_all_records()
    except UnicodeDecodeError as error:
        raise BrokenArchiveError(reason(error)) from error
    except RuntimeError as error:
        if "failed reading zip archive" in str(error):  # and not that it is whole, but another program's
            raise BrokenArchiveError(reason(error)) from error
        raise
