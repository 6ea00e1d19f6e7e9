"""Check a training checkpoint before Composer loads it."""

import datetime
import pickle
import pickletools
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.torch_version import TorchVersion

from d2v_composer.checkpoints.safe_pickle import load_untrusted
from d2v_composer.checkpoints.torch_archive import BrokenArchiveError, check_archive
from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import LARGEST_FILE
from d2v_composer.system.retry import reason

__all__ = ["OUR_ALGORITHMS", "OUR_GLOBALS", "RECONSTRUCT", "DamagedCheckpointError", "check_checkpoint"]

RECONSTRUCT = np.array(0).__reduce__()[0]

# What ours name beyond what torch itself holds for safe; numpy 1 had another name for its function.
OUR_GLOBALS = [
    datetime.timedelta,
    np.dtype,
    np.ndarray,
    RECONSTRUCT,
    (RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    TorchVersion,
    *(type(np.dtype(name)) for name in ("uint32", "uint64", "int64", "float64")),
]

# Composer evaluates what a checkpoint says of algorithms as a Python expression.
OUR_ALGORITHMS = {"GradientClipping", "GradientNorm"}


class DamagedCheckpointError(InputError):
    """A checkpoint that was not written to its end, or was damaged since."""


def check_checkpoint(path: Path) -> None:
    """Load a training checkpoint for a try, and nothing that is not in ours.

    Raises:
        DamagedCheckpointError: It is cut or damaged.
        InputError: It is not there, or is whole, but none that ``recipes/train.py`` writes.
    """
    if path.is_file() and path.stat().st_size > LARGEST_FILE:
        raise InputError(f"{path}: is not a checkpoint of recipes/train.py: it has {path.stat().st_size} bytes")
    _check_sums(path)
    try:
        check_archive(path)
        load_untrusted(path)  # within bounds of time and memory, which those below do not keep
        _check_memo(path)
        with torch.serialization.safe_globals(OUR_GLOBALS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        algorithms = [name for name, _ in checkpoint["state"]["algorithms"]]
    except BrokenArchiveError as error:
        raise DamagedCheckpointError(f"{path}: is cut or damaged, or no checkpoint ({error})") from error
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+) was not", str(error))
        what = f"it names {foreign[1]}, which none of ours does" if foreign else reason(error)
        raise InputError(f"{path}: is not a checkpoint of recipes/train.py, and is not loaded: {what}") from error
    except (RuntimeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{path}: is not a checkpoint of recipes/train.py ({reason(error)})") from error
    if not OUR_ALGORITHMS.issuperset(algorithms):
        raise InputError(f"{path}: is not a checkpoint of recipes/train.py: it has the algorithms {algorithms}")


def _check_sums(path: Path) -> None:
    """Read all of a checkpoint, which is a ZIP archive, and compare with its checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
        raise DamagedCheckpointError(f"{path}: is cut or damaged, or no checkpoint ({reason(error)})") from error
    if damaged is not None:
        raise DamagedCheckpointError(f"{path}: is damaged: the checksum of its {damaged} is wrong")


def _check_memo(path: Path) -> None:
    """Refuse a pickle whose memo's numbers are not those of its objects: pickle in C sets aside memory for them.

    Raises:
        ValueError: It has such numbers, or is none.
    """
    reader: Any = torch._C.PyTorchFileReader(str(path))  # torch's own, which may look elsewhere than others
    content: bytes = reader.get_record("data.pkl")
    for operation, number, _ in pickletools.genops(content):
        if operation.name in ("LONG_BINPUT", "PUT") and (number or 0) > len(content):
            raise ValueError(f"its pickle has an object of the number {number}")
