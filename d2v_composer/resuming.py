"""The checkpoint that a run goes on from: the newest one that is whole, and none that a stranger made.

Composer's own autoresume takes whatever ``latest-rank0.pt`` points at, unpickles it with all the code that it may
name, and takes a store that forbids reading for one that holds no checkpoint.
"""

import datetime
import logging
import pickle
import re
import zipfile
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from streaming.base.storage import CloudDownloader
from torch.torch_version import TorchVersion

from d2v_composer.errors import InputError
from d2v_composer.persistence import is_missing, persist, reason

__all__ = ["check_checkpoint", "fetch_checkpoint", "find_newest_checkpoint"]

LATEST = "latest-rank0.pt"
NAME = re.compile(r"ep\d+-ba(\d+)-rank0\.pt")
# What ours name beyond what torch itself holds for safe.
OUR_GLOBALS = [
    datetime.timedelta,
    np.dtype,
    np.ndarray,
    np.array(0).__reduce__()[0],  # numpy._core.multiarray._reconstruct
    TorchVersion,
    *(type(np.dtype(name)) for name in ("uint32", "uint64", "int64", "float64")),
]
ATTEMPT_SECONDS, PATIENCE_SECONDS = 60.0, 600.0
# Composer evaluates what a checkpoint says of algorithms as a Python expression.
OUR_ALGORITHMS = {"GradientClipping", "GradientNorm"}

log = logging.getLogger(__name__)


class DamagedCheckpointError(InputError):
    """A checkpoint that was not written to its end, or was damaged since."""


def check_checkpoint(path: Path) -> None:
    """Load a training checkpoint for a try, and nothing that is not in ours.

    Raises:
        DamagedCheckpointError: It is cut or damaged.
        InputError: It is whole, but none that ``recipes/train.py`` writes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise DamagedCheckpointError(f"{path}: is damaged: the checksum of its {damaged} is wrong")
        with torch.serialization.safe_globals(OUR_GLOBALS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        algorithms = [name for name, _ in checkpoint["state"]["algorithms"]]
    except (zipfile.BadZipFile, EOFError) as error:
        raise DamagedCheckpointError(f"{path}: is cut, or no checkpoint ({reason(error)})") from error
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+) was not", str(error))
        what = f"it names {foreign[1]}, which none of ours does" if foreign else reason(error)
        raise InputError(f"{path}: is not a checkpoint of recipes/train.py, and is not loaded: {what}") from error
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: is not a checkpoint of recipes/train.py ({reason(error)})") from error
    if not OUR_ALGORITHMS.issuperset(algorithms):
        raise InputError(f"{path}: is not a checkpoint of recipes/train.py: it has the algorithms {algorithms}")


def find_newest_checkpoint(folder: Path, remote: str | None) -> Path | None:
    """Make ``latest-rank0.pt`` in a run's folder the newest whole checkpoint: where Composer's autoresume goes on.

    Of a remote run the store's newest is fetched, where the folder has none.

    Args:
        folder: The run's, on this machine.
        remote: Its address in an object store, or ``None``.

    Returns:
        The checkpoint, or ``None`` where there is none yet.

    Raises:
        InputError: The store cannot be read, or of the checkpoints that are there none is whole, or one is not ours.
    """
    candidates = sorted(_checkpoints(folder), key=_batch, reverse=True)
    if not candidates and remote is not None:
        candidates = _fetch_newest(folder, remote)
    for path in candidates:
        try:
            check_checkpoint(path)
        except DamagedCheckpointError as error:
            log.warning("%s; the one before it is taken", error)
            continue
        _point(folder / LATEST, path)
        return path
    if candidates:
        raise InputError(f"{folder}: none of its {len(candidates)} checkpoints is whole: remove them to start anew")
    return None


def fetch_checkpoint(address: str, path: Path) -> None:
    """Bring a checkpoint from an object store to a path of this machine; each time anew, it may be another by now.

    Raises:
        InputError: It is not there, or cannot be read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not _fetch(address, path):
        raise InputError(f"{address}: no such file")


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.pt") if NAME.fullmatch(path.name)]


def _batch(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    assert match is not None  # _checkpoints and _fetch_newest give no others
    return int(match[1])


def _point(link: Path, checkpoint: Path) -> None:
    """Let the link name the checkpoint; there is no moment without it."""
    if link.is_symlink() and link.resolve() == checkpoint.resolve():
        return
    new = link.with_name(f".{link.name}.{uuid4().hex}")  # several nodes may share the folder
    new.symlink_to(checkpoint.name)
    new.replace(link)


def _fetch_newest(folder: Path, remote: str) -> list[Path]:
    """The checkpoint that the store's pointer names; none where there is no pointer."""
    folder.mkdir(parents=True, exist_ok=True)
    pointer = folder / f".{LATEST}.symlink"
    if not _fetch(f"{remote.rstrip('/')}/{LATEST}.symlink", pointer):
        return []
    name = Path(pointer.read_text().strip()).name
    pointer.unlink()
    if not NAME.fullmatch(name):
        raise InputError(f"{remote}/{LATEST}.symlink: names {name!r}, which is no checkpoint")
    if not _fetch(f"{remote.rstrip('/')}/{name}", folder / name):
        raise InputError(f"{remote}/{name}: is not there, and {LATEST}.symlink names it")
    return [folder / name]


def _fetch(address: str, path: Path) -> bool:
    """Whether there is such a file in the store; it is at ``path`` then, whole. One that is away is tried again."""
    is_there = True
    partial = path.with_name(f".{path.name}.partial")

    def attempt() -> None:
        nonlocal is_there
        try:
            CloudDownloader.direct_download(address, str(partial), ATTEMPT_SECONDS)
        except Exception as error:
            if not is_missing(error):
                raise
            is_there = False

    try:
        persist(attempt, address, PATIENCE_SECONDS)
    except Exception as error:
        raise InputError(
            f"{address}: cannot be read ({reason(error)}); whether there is a checkpoint to go on from is not known: a "
            "run in a store needs the permission to read and to list"
        ) from error
    if is_there:
        partial.replace(path)
    return is_there
