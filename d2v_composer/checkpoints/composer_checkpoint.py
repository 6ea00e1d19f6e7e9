"""Read a training checkpoint, refusing one that is corrupt or that ``recipes/train.py`` did not write."""

import datetime
import pickle
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch.torch_version import TorchVersion

from d2v_composer.checkpoints.safe_pickle import load_untrusted
from d2v_composer.checkpoints.torch_archive import BrokenArchiveError, check_archive
from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import LARGEST_FILE
from d2v_composer.system.retry import reason

__all__ = ["CorruptCheckpointError", "check_checkpoint", "is_trained", "read_checkpoint"]

RECONSTRUCT = np.array(0).__reduce__()[0]

# Globals of our checkpoints beyond those that torch allows; numpy 1 has another name for its function.
OUR_GLOBALS = [
    datetime.timedelta,
    np.dtype,
    np.ndarray,
    RECONSTRUCT,
    (RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    TorchVersion,
    *(type(np.dtype(name)) for name in ("uint32", "uint64", "int64", "float64")),
]

# Composer evaluates a checkpoint's entries for algorithms as Python expressions.
OUR_ALGORITHMS = {"CutMix", "EMA", "GradientClipping", "GradientNorm", "LabelSmoothing", "MixUp"}


class CorruptCheckpointError(InputError):
    """A checkpoint that is truncated or corrupt."""


def is_trained(contents: Any) -> TypeGuard[dict[str, Any]]:
    """Return whether the contents of a file are those of a Composer checkpoint."""
    return isinstance(contents, dict) and "state" in contents


def read_checkpoint(path: Path | str, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Load a checkpoint that names no other global than ours; the first other one raises UnpicklingError."""
    with torch.serialization.safe_globals(OUR_GLOBALS):
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)


def check_checkpoint(path: Path) -> None:
    """Verify a training checkpoint's checksums, then its contents, without running its code.

    Raises:
        CorruptCheckpointError: It is truncated or corrupt.
        InputError: It does not exist, or ``recipes/train.py`` did not write it.
    """
    foreign = f"{path}: is not a checkpoint of recipes/train.py"
    if path.is_file() and path.stat().st_size > LARGEST_FILE:
        raise InputError(f"{foreign}: it has {path.stat().st_size} bytes")
    _check_sums(path)
    try:
        check_archive(path)
        load_untrusted(path)  # limits time and memory, which torch.load does not
        algorithms = [name for name, _ in read_checkpoint(path, mmap=True)["state"]["algorithms"]]
    except BrokenArchiveError as error:
        raise CorruptCheckpointError(f"{path}: truncated, corrupt, or not a checkpoint ({reason(error)})") from error
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+) (was not|whose module)", str(error))
        what = f"it names {name[1]}, which none of ours does" if name else reason(error)
        raise InputError(f"{foreign}, and is not loaded: {what}") from error
    except (RuntimeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{foreign} ({reason(error)})") from error
    if not OUR_ALGORITHMS.issuperset(algorithms):
        raise InputError(f"{foreign}: it has the algorithms {algorithms}, allowed are {sorted(OUR_ALGORITHMS)}")


def _check_sums(path: Path) -> None:
    """Compare each record of the ZIP archive with its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            corrupt = archive.testzip()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
        raise CorruptCheckpointError(f"{path}: truncated, corrupt, or not a checkpoint ({reason(error)})") from error
    if corrupt is not None:
        raise CorruptCheckpointError(f"{path}: corrupt: the checksum of its {corrupt} is wrong")
