"""The archive that a PyTorch file is, looked at before torch reads it: a stranger may have made it."""

import tarfile
import zipfile
from pathlib import Path
from typing import Any

import torch

__all__ = ["check_archive"]


def check_archive(path: Path) -> dict[str, int] | None:
    """Refuse a program, and what is not stored as torch.save stores it.

    Returns:
        The sizes of its storages, by key, in bytes; ``None`` for a file that is no archive.

    Raises:
        ValueError: The file is a TorchScript archive, one of few bytes that become many, or a tar archive, of which
            torch would write to the disk whatever it holds.
    """
    if tarfile.is_tarfile(path):
        raise ValueError("a tar archive, as no torch of this decade writes")
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # as torch.load tells
            return None
    # torch's own reader as well: what it takes for a program is one, whatever others find in the file.
    reader: Any = torch._C.PyTorchFileReader(str(path))
    records = reader.get_all_records()
    if "constants.pkl" in records:
        raise ValueError("a TorchScript archive, which is a program")
    with zipfile.ZipFile(path) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    found = {name.partition("/")[2].casefold() for name in sizes}
    if found != {name.casefold() for name in records} or len(found) != len(records):
        raise ValueError("an archive with several files of one name")
    num_bytes = sum(sizes.values())
    if num_bytes > 2 * path.stat().st_size + (1 << 20):
        raise ValueError(f"its parts come to {num_bytes} bytes")
    return {name.rpartition("/data/")[2]: size for name, size in sizes.items() if "/data/" in name}
