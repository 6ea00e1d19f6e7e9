"""Select the checkpoint from which a run resumes: its newest complete one, never one of another program.

Composer's own autoresume loads the target of ``latest-rank0.pt`` with all the code that it names, and cannot tell a
store that denies access from one without checkpoints.
"""

import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from composer.utils import dist
from composer.utils.file_helpers import (
    create_symlink_file,
    list_remote_objects,
    maybe_create_object_store_from_uri,
    parse_uri,
)

from d2v_composer.checkpoints.safe_load import LATEST, CorruptCheckpointError, check_checkpoint
from d2v_composer.checkpoints.student_file import sha256
from d2v_composer.system.addresses import RunFolder
from d2v_composer.system.errors import InputError, reason
from d2v_composer.system.fetch import RETRY_SECONDS, download_existing
from d2v_composer.system.retry import retry

NAME = re.compile(r"ep(\d+)-ba(\d+)-rank0\.pt")

log = logging.getLogger(__name__)


def find_newest_checkpoint(folder: RunFolder) -> Path | None:
    """Return a run's newest complete checkpoint, in its local folder; ``None`` if there is no checkpoint.

    Candidates are the target of Composer's pointer ``latest-rank0.pt`` and the checkpoints before it; without a
    pointer, all checkpoints. Truncated or corrupt ones are skipped with a warning. If the object store has a newer
    checkpoint than the local folder, it is fetched.

    Raises:
        InputError: The store cannot be read, no checkpoint is complete, or ``recipes/train.py`` did not write it.
    """
    candidates = _local_candidates(folder.local)
    newest = next(filter(_is_complete, candidates), None)
    if folder.address is not None:
        newest = _newer_in_store(folder, folder.address, newest)
    if newest is None and (folder.local / LATEST).is_symlink():
        raise InputError(
            f"{folder.local}: none of its {len(candidates)} checkpoints is complete: remove them to restart"
        )
    if newest is None and candidates:
        log.warning("%s: its first checkpoint is truncated: the run starts from scratch", folder.local)
    return newest


def _local_candidates(folder: Path) -> list[Path]:
    pointer = folder / LATEST
    pointed_at = pointer.readlink().name if pointer.is_symlink() else None
    return [folder / name for name in newest_first((path.name for path in folder.glob("*.pt")), pointed_at)]


def newest_first(names: Iterable[str], pointed_at: str | None) -> list[str]:
    """Return the checkpoints among file names, from the pointer's target to the oldest.

    Args:
        names: File names; those of other files are ignored.
        pointed_at: The pointer's target. Later checkpoints are ignored: the run was restarted before them. ``None``
            keeps all.
    """
    checkpoints = sorted(filter(NAME.fullmatch, names), key=_age, reverse=True)
    if pointed_at is None or not NAME.fullmatch(pointed_at):
        return checkpoints
    return [name for name in checkpoints if _age(name) <= _age(pointed_at)]


def _age(name: str) -> tuple[int, ...]:
    """Return the batches and epochs in a checkpoint's name."""
    return tuple(int(number) for number in reversed(re.findall(r"\d+", name)[:2]))


def _is_complete(checkpoint: Path) -> bool:
    try:
        check_checkpoint(checkpoint)
    except CorruptCheckpointError as error:
        log.warning("%s: skipped", error)
        return False
    return True


def _newer_in_store(folder: RunFolder, address: str, newest: Path | None) -> Path | None:
    """Fetch the store's newest complete checkpoint if it is newer than ``newest``; otherwise return ``newest``."""
    num_corrupt = 0
    for name in _remote_candidates(folder.local, address):
        if newest is not None and _age(name) <= _age(newest.name):
            return newest
        try:
            path = folder.local / name
            if not (path.is_file() and _is_complete(path)):
                download_checkpoint(f"{address}/{name}", path)
                check_checkpoint(path)
            return path
        except CorruptCheckpointError as error:
            log.warning("%s, from the store: skipped", error)
            num_corrupt += 1
    if newest is None and num_corrupt:
        raise InputError(f"{address}: none of its {num_corrupt} checkpoints is complete: remove them to restart")
    return newest


def _remote_candidates(folder: Path, address: str) -> Iterator[str]:
    """Yield the names of a store's checkpoints like :func:`newest_first`; none without a pointer."""
    prefix = f"{address}/"
    pointed_at = _read_pointer(f"{prefix}{LATEST}", folder)
    if pointed_at is None:
        return
    yield pointed_at
    try:
        keys = list_remote_objects(prefix)
    except Exception as error:
        raise InputError(f"{prefix}: cannot be listed to find an older checkpoint ({reason(error)})") from error
    names = [key.removeprefix(parse_uri(prefix)[2]) for key in keys]
    yield from (name for name in newest_first(names, pointed_at) if name != pointed_at)


def complete_store(newest: Path, folder: RunFolder, always: bool) -> None:
    """Upload the newest checkpoint, and the pointer to it, if a killed run did not.

    Args:
        newest: In the local folder, not from the store.
        folder: The run's.
        always: Upload it even if the pointer names it. Other nodes fetch it from there, and after a change of machines
            the store may have another one of that name.

    Raises:
        InputError: The store cannot be read or written.
    """
    pointer = f"{folder.address}/{LATEST}"
    is_named = _read_pointer(pointer, folder.local) == newest.name
    if is_named and not always:
        return
    key = parse_uri(pointer)[2].removesuffix(LATEST) + newest.name
    store = maybe_create_object_store_from_uri(pointer)
    assert store is not None  # a run's store is one of Composer's

    def upload_once() -> None:
        store.upload_object(key, str(newest))
        if not is_named:
            with TemporaryDirectory() as temporary:
                create_symlink_file(key, target := f"{temporary}/{LATEST}.symlink")
                store.upload_object(f"{parse_uri(pointer)[2]}.symlink", target)

    try:
        retry(upload_once, pointer, RETRY_SECONDS)
    except Exception as error:
        raise InputError(f"{folder.address}: {newest.name} cannot be written to it ({reason(error)})") from error


def broadcast_checkpoint(newest: Path | None) -> tuple[str, str] | None:
    """Return the name and the sha256 of rank 0's checkpoint on every rank."""
    found = [None if newest is None else (newest.name, sha256(newest))]
    dist.broadcast_object_list(found)
    return found[0]


def fetch_same_checkpoint(name: str, digest: str, folder: RunFolder) -> None:
    """Make sure that this node's local folder has rank 0's checkpoint; download it if it has none or another's.

    Args:
        name: The checkpoint's.
        digest: Its sha256 on rank 0, which has verified it.
        folder: The run's.

    Raises:
        InputError: The checkpoint cannot be fetched, or differs: nodes would train different weights.
    """
    path, address = folder.local / name, folder.address and f"{folder.address}/{name}"
    if path.is_file() and sha256(path) == digest:
        return
    if address is not None:
        download_checkpoint(address, path)
    else:
        check_checkpoint(path)
    if sha256(path) != digest:
        raise InputError(f"{address or path}: differs from the checkpoint of that name on node 0")


def download_checkpoint(address: str, path: Path) -> None:
    """Download a checkpoint, even if ``path`` exists: the address may have a new one.

    Args:
        address: https://…, or in an object store, where ``latest-rank0.pt`` is a small file with another's name.
        path: The local file.

    Raises:
        InputError: It does not exist, or cannot be read.
    """
    if _download(address, path):
        return
    target = _read_pointer(address, path.parent)
    if target is None or not _download(f"{address.rpartition('/')[0]}/{target}", path):
        raise InputError(f"{address}: no such file")


def _read_pointer(address: str, folder: Path) -> str | None:
    """Return the target of a store's symlink, which Composer writes as a small file; ``None`` if it does not exist."""
    pointer = folder / f".{uuid4().hex}.symlink"
    if not _download(f"{address}.symlink", pointer):
        return None
    name = Path(pointer.read_text().strip()).name
    pointer.unlink()
    if not NAME.fullmatch(name):
        raise InputError(f"{address}.symlink: names {name!r}, expected a checkpoint such as ep1-ba12-rank0.pt")
    return name


def _download(address: str, path: Path) -> bool:
    """Download a file; return whether it exists. If the store is unreachable, retry."""
    try:
        return download_existing(address, path)
    except Exception as error:
        raise InputError(
            f"{address}: cannot be read ({reason(error)}), so the newest checkpoint is unknown: a run in a store needs "
            "permission to read and to list"
        ) from error


def drop_unused_scaler(checkpoint: dict[str, Any], precision: str) -> None:
    """Remove the loss scaler's state from a checkpoint unless it was saved, and is loaded, with amp_fp16.

    Only amp_fp16 scales its loss, with a class of its own. In other precisions the Trainer has a scaler too: on a CPU
    it is disabled and saves an empty state, on a GPU it is enabled and refuses an empty state.
    """
    state = checkpoint["state"]
    if "scaler" in state and not (precision == "amp_fp16" and state["scaler"].get("GradScaler")):
        del state["scaler"]
