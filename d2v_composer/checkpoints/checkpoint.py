"""The checkpoints of a run: their names, and how they are read, published, selected, uploaded and removed.

Files with other names are ignored. Composer's own autoresume runs any code that the target of ``latest-rank0.pt``
names, and cannot tell a store that denies access from one without checkpoints.
"""

import datetime
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from d2v_composer.checkpoints.safe_load import check_archive, fault_of
from d2v_composer.models.provenance import Record
from d2v_composer.system.addresses import MARK, RunFolder
from d2v_composer.system.errors import InputError, reading, reason
from d2v_composer.system.fetch import (
    RETRY_SECONDS,
    download_existing,
    fetch,
    is_missing,
    is_remote,
    list_names,
    open_store,
    put,
    retry,
)
from d2v_composer.system.files import check_owned, flush, move, partial_file

CHECKPOINT_NAME = re.compile(r"ep(\d+)-ba(\d+)-rank0\.pt")
LATEST = "latest-rank0.pt"
BEST = "best-rank0.pt"
# Composer's pointer in a store: a small file with a key.
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
ALGORITHMS = {
    "gradient_clipping": "d2v_composer.callbacks.algorithms:GradientClipping",
    "mixup": "composer.algorithms:MixUp",
    "cutmix": "composer.algorithms:CutMix",
    "label_smoothing": "composer.algorithms:LabelSmoothing",
}
"""Name in the section ``algorithms`` → the class of which its fields are the arguments."""

ReadT = TypeVar("ReadT")

log = logging.getLogger(__name__)


class CorruptCheckpointError(InputError):
    """A truncated or corrupt checkpoint; a resumed run uses the one before it."""


class Checkpoint(NamedTuple):
    """A checkpoint that was read."""

    path: Path
    contents: Record
    """The state as Composer saves it; a file from elsewhere may hold anything."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The state dict of the model."""
        return self.contents["state"]["model"]

    @property
    def algorithms(self) -> list[str]:
        """The names of the run's algorithms."""
        return [name for name, _ in self.contents["state"]["algorithms"]]

    def trained(self, unit: str) -> int:
        """Return how long the run has trained, in ``batch`` or ``epoch``."""
        return int(self.contents["state"]["timestamp"]["Timestamp"][unit])

    def saved_by(self, callback: str) -> Record:
        """Return what a callback saved, given its class's name; empty if the run had none."""
        return self.contents["state"]["callbacks"].get(callback, {})

    @property
    def record(self) -> Record:
        """The record of the run."""
        return self.saved_by("RunRecord")["record"]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a run's checkpoint: verify its checksums, then its contents, without running its code.

    Raises:
        CorruptCheckpointError: The file is truncated or corrupt.
        InputError: The file cannot be read, or no run of this package wrote it.
    """
    check_archive(path, CorruptCheckpointError)
    foreign = f"{path} is not a checkpoint written by recipes/train.py"
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
    if not tensors or not all(isinstance(tensor, Tensor) and tensor.isfinite().all() for tensor in tensors):
        raise InputError(f"{foreign}: expected only tensors of finite numbers in state.model")
    return checkpoint


def find_newest(
    folder: RunFolder, accept: Callable[[Checkpoint], object], *, resumes: bool = True, uploads: bool = False
) -> Checkpoint | None:
    """Read a run's newest complete checkpoint, from its local folder or its store; ``None`` if there is none.

    Once a checkpoint is accepted, ``latest-rank0.pt`` points at it. With a checkpoint from the store, the log is
    downloaded, too, because another machine went on with the run.

    Candidates are the targets of the pointers ``latest-rank0.pt``, here and in the store, and the checkpoints before
    them; without a pointer, all local checkpoints. Truncated or corrupt ones are skipped with a warning.

    Args:
        folder: The run's folder.
        accept: Function that raises if a checkpoint is of another run; called before anything changes.
        resumes: If false, checkpoints in the folder are an error.
        uploads: Upload a local checkpoint, for other nodes, even if the store has one of that name: after a change of
            machines, that one may differ.

    Raises:
        InputError: The store cannot be read or holds other files, no checkpoint is complete, a checkpoint is not one
            of this package, or there are checkpoints although ``resumes`` is false.
        Exception: ``accept`` raised it.
        RunError: The store cannot be written.
    """
    pointer = folder.local / LATEST
    here = newest_first(
        (path.name for path in folder.local.glob("*.pt")), pointer.readlink().name if pointer.is_symlink() else None
    )
    there = [] if folder.address is None else _stored_checkpoints(folder.address)
    if (here or there) and not resumes:
        raise InputError(
            f"autoresume: must be true, because {folder} holds a run's checkpoints; a new run needs another save_folder"
        )
    local_log = folder.local / LOG

    def read_one(name: str) -> Checkpoint | None:
        path = folder.local / name
        if name in here:
            with _skipped_if_corrupt():
                accept(checkpoint := read_checkpoint(path))
                if uploads and folder.address is not None:
                    upload_checkpoint(path, folder.address)
                return checkpoint
        if name in there:
            with _skipped_if_corrupt(), partial_file(path) as fetched:
                download_checkpoint(f"{folder.address}/{name}", fetched)
                accept(checkpoint := read_checkpoint(fetched)._replace(path=path))
                _download(f"{folder.address}/{LOG}", local_log)
                _download(f"{folder.address}/{BEST}", folder.local / BEST)
                return checkpoint
        return None

    newest = next(filter(None, map(read_one, newest_first({*here, *there}))), None)
    if newest is None:
        if here or there:
            raise InputError(f"{folder}: none of its checkpoints is complete; remove them to restart")
        return None
    if os.path.realpath(pointer) != os.path.realpath(newest.path):  # another machine saved it, or it is damaged
        point_at(newest.path)
    if folder.address is not None and not local_log.exists():
        _download(f"{folder.address}/{LOG}", local_log)
    return newest


@contextmanager
def _skipped_if_corrupt() -> Iterator[None]:
    """Warn of a corrupt checkpoint, and go on after the ``with`` block."""
    try:
        yield
    except CorruptCheckpointError as error:
        log.warning("%s: skipped", error)


def read_newest(path: Path, read: Callable[[Path], ReadT]) -> ReadT:
    """Read a file, or the target of a run's pointer; retry if the run has replaced it meanwhile.

    Raises:
        InputError, OSError: ``read`` raised it for a file that is still the newest.
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
    """Return a file's local path, like :func:`fetch`. The error for a run's folder names its newest checkpoint."""
    with reading(path):
        if not is_remote(path) and (newest := Path(path) / LATEST).exists():
            raise InputError(f"{path} is the folder of a run, not a model's file; its newest checkpoint is {newest}")
    return fetch(path)


def publish(partial: Path, checkpoint: Path) -> None:
    """Rename a complete checkpoint, then point ``latest-rank0.pt`` at it; readers find the old or the new one."""
    with suppress(FileNotFoundError):
        flush(checkpoint.with_name(LOG))  # a resumed run logs only what follows
    move(partial, checkpoint)
    point_at(checkpoint)


def point_at(checkpoint: Path) -> None:
    """Let ``latest-rank0.pt`` point at a checkpoint."""
    pointer = checkpoint.with_name(".latest.partial")
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(checkpoint.name)
    pointer.replace(checkpoint.with_name(LATEST))
    flush(checkpoint.parent)


def prune(folder: Path, num_to_keep: int) -> None:
    """Remove the outdated checkpoints from a folder."""
    names = [path.name for path in folder.iterdir()]
    for name in outdated(names, (folder / LATEST).readlink().name, num_to_keep):
        (folder / name).unlink(missing_ok=True)


def prune_store(address: str, pointed_at: str, num_to_keep: int) -> None:
    """Remove the outdated checkpoints from a run's folder in S3; a failure must not stop the run."""
    store, key = open_store(address)
    from composer.utils.object_store import S3ObjectStore

    if not isinstance(store, S3ObjectStore):  # Composer's other clients cannot delete
        return
    try:
        for name in outdated(list_names(address), pointed_at, num_to_keep):
            store.client.delete_object(Bucket=store.bucket, Key=f"{key}/{name}".lstrip("/"))
    except Exception as error:  # noqa: BLE001
        log.warning("%s: could not remove old checkpoints (%s)", address, reason(error))


def outdated(names: Iterable[str], pointed_at: str, num_to_keep: int) -> list[str]:
    """Return the names of the checkpoints to remove: never the pointer's target or a newer one."""
    return [] if num_to_keep < 0 else newest_first(names, pointed_at)[num_to_keep:]


def newest_first(names: Iterable[str], pointed_at: str | None = None) -> list[str]:
    """Return the checkpoints among file names, from the pointer's target to the oldest.

    Args:
        names: File names; those of other files are ignored.
        pointed_at: The pointer's target. Later checkpoints are ignored: the run was restarted before them. ``None``
            keeps all.
    """
    checkpoints = sorted(filter(CHECKPOINT_NAME.fullmatch, names), key=_age, reverse=True)
    if pointed_at is None or not CHECKPOINT_NAME.fullmatch(pointed_at):
        return checkpoints
    return [name for name in checkpoints if _age(name) <= _age(pointed_at)]


def _age(name: str) -> tuple[int, ...]:
    """Return the batch and epoch numbers in a checkpoint's name."""
    return tuple(int(number) for number in reversed(re.findall(r"\d+", name)[:2]))


def _stored_checkpoints(address: str) -> list[str]:
    """Return the names of a store's checkpoints in the order of :func:`newest_first`; empty without a pointer."""
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


def upload_missing(folder: RunFolder) -> None:
    """Upload a run's newest checkpoint if its store lacks it: a run was killed before the upload, or had no store.

    Raises:
        RunError: The store cannot be written.
    """
    newest = Path(os.path.realpath(folder.local / LATEST))
    if folder.address is not None and newest.exists() and newest.name not in _stored_checkpoints(folder.address)[:1]:
        if (best := newest.with_name(BEST)).exists():
            put(best, f"{folder.address}/{BEST}", denial_passes=True)
        upload_checkpoint(newest, folder.address)


def download_checkpoint(address: str, path: Path) -> None:
    """Download a checkpoint, even if ``path`` exists: the store may have a newer one.

    Args:
        address: https://…, or an address in an object store, where a small file stands for ``latest-rank0.pt`` and has
            the name of the newest checkpoint.
        path: The local file.

    Raises:
        InputError: The checkpoint does not exist, or cannot be read.
    """
    if _download(address, path):
        return
    target = _read_pointer(f"{address}.symlink")
    if target is None or not _download(f"{address.rpartition('/')[0]}/{target}", path):
        raise InputError(f"{address}: no such file")


def _read_pointer(address: str) -> str | None:
    """Return the checkpoint name in a store's pointer; ``None`` without a pointer."""
    with TemporaryDirectory() as folder:
        pointer = Path(folder) / STORED_POINTER
        return Path(pointer.read_text().strip()).name if _download(address, pointer) else None


def _download(address: str, path: Path) -> bool:
    """Download a file, with retries while the store is unreachable; return False if it does not exist."""
    try:
        return download_existing(address, path)
    except Exception as error:
        raise InputError(
            f"{address} cannot be read ({reason(error)}), so the newest checkpoint is unknown: a run in a store needs "
            "permission to read and list objects"
        ) from error


def upload_checkpoint(path: Path, address: str) -> None:
    """Upload a checkpoint to a run's folder in a store, then the pointer to it."""
    from composer.utils import parse_uri
    from composer.utils.file_helpers import create_symlink_file

    put(path, f"{address}/{path.name}", denial_passes=True)
    with TemporaryDirectory() as folder:
        create_symlink_file(parse_uri(f"{address}/{path.name}")[2], pointer := Path(folder) / STORED_POINTER)
        put(pointer, f"{address}/{STORED_POINTER}", denial_passes=True)


def drop_unused_scaler(checkpoint: Record, precision: str) -> None:
    """Remove the loss scaler's state from a checkpoint unless both the run that saved it and this one use amp_fp16.

    Only amp_fp16 scales the loss, with a scaler of its own class. In other precisions, the Trainer's scaler is unused:
    on a CPU it is disabled and saves an empty state; on a GPU it is enabled and refuses an empty state.
    """
    state = checkpoint["state"]
    if "scaler" in state and not (precision == "amp_fp16" and state["scaler"].get("GradScaler")):
        del state["scaler"]
