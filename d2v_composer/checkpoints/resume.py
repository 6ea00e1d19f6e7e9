"""The checkpoint that a run goes on from: the newest one that is whole, and none that a stranger made.

Composer's own autoresume takes whatever ``latest-rank0.pt`` points at, unpickles it with all the code that it may
name, and takes a store that forbids reading for one that holds no checkpoint.
"""

import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from composer.utils.file_helpers import list_remote_objects, parse_uri

from d2v_composer.checkpoints.composer_checkpoint import DamagedCheckpointError, check_checkpoint
from d2v_composer.system.atomic_files import partial_file
from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import transfer
from d2v_composer.system.retry import is_missing, reason, retry

__all__ = [
    "LATEST",
    "bring_checkpoint",
    "drop_unused_scaler",
    "fetch_checkpoint",
    "find_newest_checkpoint",
    "newest_first",
]

LATEST = "latest-rank0.pt"
NAME = re.compile(r"ep(\d+)-ba(\d+)-rank0\.pt")
ATTEMPT_SECONDS, PATIENCE_SECONDS = 60.0, 600.0

log = logging.getLogger(__name__)


def find_newest_checkpoint(folder: Path, remote: str | None = None) -> Path | None:
    """The newest whole checkpoint of a run, in its folder on this machine.

    The newest is what Composer's pointer ``latest-rank0.pt`` says, or the one before it where that is damaged, or,
    without a pointer, the one of the latest batch. Of a remote run the store's is fetched where it is of a later batch.

    Args:
        folder: The run's, on this machine.
        remote: Its address in an object store, or ``None``.

    Returns:
        The checkpoint, or ``None`` where there is none yet.

    Raises:
        InputError: The store cannot be read, none of the checkpoints is whole, or one is not ours.
    """
    candidates = _candidates(folder)
    newest = next(filter(_is_whole, candidates), None)
    if remote is not None:
        newest = _newer_in_store(folder, remote, newest)
    if newest is None and (folder / LATEST).is_symlink():
        raise InputError(f"{folder}: none of its {len(candidates)} checkpoints is whole: remove them to start anew")
    if newest is None and candidates:
        log.warning("%s: its first checkpoint was not written to its end: the run starts anew", folder)
    return newest


def _candidates(folder: Path) -> list[Path]:
    """What may be the newest checkpoint, the best first: the pointer's, and those before it."""
    pointer = folder / LATEST
    pointed_at = pointer.readlink().name if pointer.is_symlink() else None
    return [folder / name for name in newest_first((path.name for path in folder.glob("*.pt")), pointed_at)]


def newest_first(names: Iterable[str], pointed_at: str | None) -> list[str]:
    """The checkpoints among some files' names, from the one that the pointer names to the oldest.

    Args:
        names: The files'.
        pointed_at: The one that the pointer names. A later one was abandoned, when somebody began again before it;
            without a pointer, all count.
    """
    checkpoints = sorted(filter(NAME.fullmatch, names), key=_age, reverse=True)
    if pointed_at is None or not NAME.fullmatch(pointed_at):
        return checkpoints
    return [name for name in checkpoints if _age(name) <= _age(pointed_at)]


def _age(name: str) -> tuple[int, int]:
    """Batches and epochs of training, as a checkpoint's name says."""
    match = NAME.fullmatch(name)
    assert match is not None  # who calls this has looked
    return int(match[2]), int(match[1])


def _is_whole(checkpoint: Path) -> bool:
    try:
        check_checkpoint(checkpoint)
    except DamagedCheckpointError as error:
        log.warning("%s; it is passed over", error)
        return False
    return True


def bring_checkpoint(name: str, folder: Path, remote: str | None) -> Path:
    """A checkpoint by its name, whole, in the folder on this machine: it is there, or is fetched from the store.

    Raises:
        InputError: It is not to be had, or none that is to be loaded.
    """
    path = folder / name
    if remote is not None:
        if path.is_file() and _is_whole(path):
            return path
        fetch_checkpoint(f"{remote.rstrip('/')}/{name}", path)
    check_checkpoint(path)
    return path


def drop_unused_scaler(checkpoint: dict[str, Any], precision: str) -> None:
    """Leave a loss scaler's state out of what is loaded, unless a run in this precision goes on with it.

    Only amp_fp16 scales its loss, with a class of its own. In other precisions the Trainer has a scaler as well: on a
    CPU it is disabled and saves an empty state, on a GPU it is enabled and refuses an empty state.
    """
    state = checkpoint["state"]
    if "scaler" in state and not (precision == "amp_fp16" and state["scaler"].get("GradScaler")):
        del state["scaler"]


def fetch_checkpoint(address: str, path: Path) -> None:
    """Bring a checkpoint to a path of this machine, each time anew, for it may be another by now.

    Args:
        address: https://…, or in an object store; there, Composer's ``latest-rank0.pt`` is a file that names another.
        path: Where it is to be.

    Raises:
        InputError: It is not there, or cannot be read.
    """
    if _fetch(address, path):
        return
    target = _follow(address, path.with_name(f".{uuid4().hex}.symlink"))
    if target is None or not _fetch(f"{address.rpartition('/')[0]}/{target}", path):
        raise InputError(f"{address}: no such file")


def _newer_in_store(folder: Path, remote: str, newest: Path | None) -> Path | None:
    """The newest whole checkpoint of a store, fetched, where it is newer than what this machine has; otherwise that."""
    damaged = 0
    for name in _remote_candidates(folder, remote):
        if newest is not None and _age(name) <= _age(newest.name):
            return newest
        try:
            return bring_checkpoint(name, folder, remote)
        except DamagedCheckpointError as error:
            log.warning("%s, from the store; it is passed over", error)
            damaged += 1
    if newest is None and damaged:
        raise InputError(f"{remote}: none of its {damaged} checkpoints is whole: remove them to start anew")
    return newest


def _remote_candidates(folder: Path, remote: str) -> Iterator[str]:
    """The names of what may be a store's newest checkpoint, the best first; none, where there is no pointer yet."""
    remote = f"{remote.rstrip('/')}/"
    pointed_at = _follow(f"{remote}{LATEST}", folder / f".{uuid4().hex}.symlink")
    if pointed_at is None:
        return
    yield pointed_at
    try:
        keys = list_remote_objects(remote)
    except Exception as error:
        raise InputError(f"{remote}: cannot be looked through for an older checkpoint ({reason(error)})") from error
    names = [key.removeprefix(parse_uri(remote)[2]) for key in keys]
    yield from (name for name in newest_first(names, pointed_at) if name != pointed_at)


def _follow(address: str, pointer: Path) -> str | None:
    """The name in a store's symlink, which Composer writes as a small file; ``None`` where there is none."""
    if not _fetch(f"{address}.symlink", pointer):
        return None
    name = Path(pointer.read_text().strip()).name
    pointer.unlink()
    if not NAME.fullmatch(name):
        raise InputError(f"{address}.symlink: names {name!r}, which is no checkpoint")
    return name


def _fetch(address: str, path: Path) -> bool:
    """Whether there is such a file; it is at ``path`` then, whole. A store that is away is tried again."""

    def transfer_once() -> None:
        with partial_file(path) as partial:
            transfer(address, partial, ATTEMPT_SECONDS)

    try:
        retry(transfer_once, address, PATIENCE_SECONDS)
    except Exception as error:
        if is_missing(error):
            return False
        raise InputError(
            f"{address}: cannot be read ({reason(error)}); whether there is a checkpoint to go on from is not known: a "
            "run in a store needs the permission to read and to list"
        ) from error
    return True
