"""Fetch model files; download, read and sort a run's checkpoints, which are named ``epEPOCH-baBATCH-rank0.pt``."""

import datetime
import logging
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from d2v_composer.checkpoints.safe_load import check_archive, fault_of
from d2v_composer.models.provenance import Record
from d2v_composer.system.addresses import MARK
from d2v_composer.system.errors import InputError, reading, reason
from d2v_composer.system.fetch import (
    RETRY_SECONDS,
    download_existing,
    fetch,
    is_missing,
    is_remote,
    list_names,
    retry,
)
from d2v_composer.system.files import check_owned

CHECKPOINT_NAME = re.compile(r"ep(\d+)-ba(\d+)-rank0\.pt")
LATEST = "latest-rank0.pt"
# Composer's pointer in a store: a small file that contains the key of the newest checkpoint.
STORED_POINTER = f"{LATEST}.symlink"
LOG = "log.jsonl"
# A run may save a newer checkpoint and remove the one that is being read; its pointer is missing for a moment.
READ_ATTEMPTS, READ_PAUSE = 20, 0.05
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

ReadT = TypeVar("ReadT")

log = logging.getLogger(__name__)


class CorruptCheckpointError(InputError):
    """A checkpoint is truncated or corrupt."""


class Checkpoint(NamedTuple):
    """A checkpoint's path and contents."""

    path: Path
    contents: Record
    """The dict that Composer saved."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The model's state dict."""
        return self.contents["state"]["model"]

    @property
    def algorithms(self) -> list[str]:
        """Class names of the Composer algorithms that the run applied."""
        return [name for name, _ in self.contents["state"]["algorithms"]]

    def trained(self, unit: str) -> int:
        """Return the number of batches or of epochs that the run had trained; ``unit`` is ``batch`` or ``epoch``."""
        return int(self.contents["state"]["timestamp"]["Timestamp"][unit])

    def saved_by(self, callback: str) -> Record:
        """Return the state of the callback with this class name; {} if the run had no callback of this class."""
        return self.contents["state"]["callbacks"].get(callback, {})

    @property
    def record(self) -> Record:
        """The run's record, saved by the callback ``RunRecord``."""
        return self.saved_by("RunRecord")["record"]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a run's checkpoint, without running code in the file."""
    check_archive(path, CorruptCheckpointError)
    foreign = f"{path} is not a checkpoint of a d2v_composer run"
    try:
        with torch.serialization.safe_globals(OUR_GLOBALS):
            # Without mmap, torch reads as many numbers as the pickle says, even if the record has fewer.
            checkpoint = Checkpoint(path, torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        tensors = list(checkpoint.tensors.values())
        ",".join(checkpoint.algorithms)  # fails if these are no names
    except Exception as error:
        if isinstance(error, RuntimeError):  # torch's reader of archives
            raise CorruptCheckpointError(f"{path}: truncated or corrupt ({fault_of(error)})") from error
        raise InputError(f"{foreign} ({fault_of(error)})") from error
    # Composer does not load strictly: it would train on from random weights.
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise InputError(f"{foreign}: expected only tensors in state.model")
    if name := next((name for name, tensor in checkpoint.tensors.items() if not tensor.isfinite().all()), None):
        raise InputError(f"{path}: tensor {name} has values that are not finite")
    return checkpoint


def read_newest(path: Path, read: Callable[[Path], ReadT]) -> ReadT:
    """Call ``read`` with the resolved path of a run's file, and return the result.

    If ``read`` fails because the run has replaced the file meanwhile, try again.
    """
    for attempt in range(READ_ATTEMPTS):
        with reading(path):
            file = path.resolve()
        try:
            return read(file)
        except (InputError, OSError):
            if attempt == READ_ATTEMPTS - 1 or (file.exists() and path.resolve() == file):
                raise
            time.sleep(READ_PAUSE)
    raise AssertionError  # the last attempt returned or raised


def fetch_model(path: str | Path) -> Path:
    """Return the local path of a model's file; a remote file is downloaded to the cache."""
    with reading(path):
        if not is_remote(path) and (newest := Path(path) / LATEST).exists():
            raise InputError(f"{path} is the folder of a run, not a model's file; its newest checkpoint is {newest}")
    return fetch(path)


def newest_first(names: Iterable[str], pointed_at: str | None = None) -> list[str]:
    """Return those of ``names`` that are names of checkpoints, newest first."""
    # The run was restarted before the checkpoints that are newer than the pointer's target.
    checkpoints = sorted(filter(CHECKPOINT_NAME.fullmatch, names), key=_age, reverse=True)
    if pointed_at is None or not CHECKPOINT_NAME.fullmatch(pointed_at):
        return checkpoints
    return [name for name in checkpoints if _age(name) <= _age(pointed_at)]


def _age(name: str) -> tuple[int, ...]:
    """Return the batch and the epoch in a checkpoint's name, by which checkpoints are sorted."""
    return tuple(int(number) for number in reversed(re.findall(r"\d+", name)[:2]))


def stored_checkpoints(address: str) -> list[str]:
    """Return the names of a run's checkpoints in a store, newest first; [] if the store has no pointer file.

    Checkpoints newer than the one that the pointer file names are left out.
    """
    try:
        names = retry(lambda: list_names(address), address, RETRY_SECONDS)
    except Exception as error:
        if is_missing(error):
            return []
        raise InputError(
            f"{address} cannot be listed ({reason(error)}), so the newest checkpoint is unknown"
        ) from error
    if STORED_POINTER in names:
        return newest_first(names, _read_pointer(f"{address}/{STORED_POINTER}"))
    check_owned(address, names, MARK, "save_folder")
    return []


def download_checkpoint(address: str, path: Path) -> None:
    """Download a checkpoint to ``path``, where it replaces an older file."""
    if download(address, path):
        return
    target = _read_pointer(f"{address}.symlink")
    if target is None or not download(f"{address.rpartition('/')[0]}/{target}", path):
        raise InputError(f"{address}: no such file")


def _read_pointer(address: str) -> str | None:
    """Return the name of the checkpoint that a pointer file names; ``None`` if there is no pointer file."""
    with TemporaryDirectory() as folder:
        pointer = Path(folder) / STORED_POINTER
        return Path(pointer.read_text().strip()).name if download(address, pointer) else None


def download(address: str, path: Path) -> bool:
    """Download a run's file; return False if the file does not exist."""
    try:
        return download_existing(address, path)
    except Exception as error:
        raise InputError(
            f"{address} cannot be read ({reason(error)}); if access was denied, permit both reading and listing"
        ) from error
