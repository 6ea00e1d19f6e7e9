"""Select the checkpoint from which a run resumes: its newest complete one. Files with other names are ignored.

Composer's own autoresume loads the target of ``latest-rank0.pt`` with all the code that it names, and cannot tell a
store that denies access from one without checkpoints.
"""

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from composer.utils import ObjectStore, maybe_create_object_store_from_uri, parse_uri
from composer.utils.file_helpers import create_symlink_file

from d2v_composer.checkpoints.safe_load import LATEST, CorruptCheckpointError, check_checkpoint
from d2v_composer.system.addresses import MARK, RunFolder
from d2v_composer.system.errors import InputError, RunError, reason
from d2v_composer.system.fetch import RETRY_SECONDS, download_existing
from d2v_composer.system.retry import is_missing, retry

NAME = re.compile(r"ep(\d+)-ba(\d+)-rank0\.pt")
LOG = "log.jsonl"
# Composer's pointer in a store: a small file with a key.
STORED_POINTER = f"{LATEST}.symlink"

log = logging.getLogger(__name__)


def find_newest_checkpoint(folder: RunFolder, *, resumes: bool = True, uploads: bool = False) -> Path | None:
    """Return a run's newest complete checkpoint, from its local folder or its store; ``None`` if there is none.

    ``latest-rank0.pt`` points at it from then on. A log in the store that is longer than the local one replaces it:
    another machine went on.

    Candidates are the targets of the two pointers ``latest-rank0.pt`` and the checkpoints before them; without a
    pointer, all local ones. Truncated or corrupt ones are skipped with a warning.

    Args:
        folder: The run's folder.
        resumes: It may have checkpoints.
        uploads: Upload a local checkpoint even if the store has one of that name: after a change of machines it may
            be another.

    Raises:
        InputError: The store cannot be read or holds other files, no checkpoint is complete, ``recipes/train.py`` did
            not write it, or there is one and not ``resumes``.
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
    for name in newest_first({*here, *there}):
        path = folder.local / name
        if name in here and _is_complete(path):
            if folder.address is not None and (uploads or there[:1] != [name]):
                upload_checkpoint(path, folder.address)
            break
        if name in there:
            download_checkpoint(f"{folder.address}/{name}", path)
            if _is_complete(path):
                break
    else:
        if here or there:
            raise InputError(f"{folder}: none of its checkpoints is complete; remove them to restart")
        return None
    if pointer.resolve() != path.resolve():  # another machine saved it
        point_at(path)
    ours, stored = folder.local / LOG, folder.local / f"{LOG}.stored"
    if folder.address is not None and _download(f"{folder.address}/{LOG}", stored):
        if not ours.exists() or stored.stat().st_size > ours.stat().st_size:
            stored.replace(ours)
        stored.unlink(missing_ok=True)
    return path


def point_at(checkpoint: Path) -> None:
    """Let ``latest-rank0.pt`` point at a checkpoint."""
    pointer = checkpoint.with_name(".latest.partial")
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(checkpoint.name)
    pointer.replace(checkpoint.with_name(LATEST))


def newest_first(names: Iterable[str], pointed_at: str | None = None) -> list[str]:
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
    """Return the batch and epoch numbers in a checkpoint's name."""
    return tuple(int(number) for number in reversed(re.findall(r"\d+", name)[:2]))


def _is_complete(checkpoint: Path) -> bool:
    try:
        check_checkpoint(checkpoint)
    except CorruptCheckpointError as error:
        log.warning("%s: skipped", error)
        return False
    return True


def _stored_checkpoints(address: str) -> list[str]:
    """Return the names of a store's checkpoints in the order of :func:`newest_first`; empty without a pointer."""
    try:
        names = retry(lambda: list_names(address), address, RETRY_SECONDS)
    except Exception as error:
        if is_missing(error):
            return []
        raise InputError(
            f"{address}: cannot be listed ({reason(error)}), so the newest checkpoint is unknown"
        ) from error
    if STORED_POINTER in names:
        return newest_first(names, _read_pointer(f"{address}/{STORED_POINTER}"))
    if names and MARK not in names:
        raise InputError(
            f"save_folder: {address} holds files that are not ours, such as {names[0]}; choose another folder"
        )
    return []


def download_checkpoint(address: str, path: Path) -> None:
    """Download a checkpoint, even if ``path`` exists: the store may have a newer one.

    Args:
        address: https://…, or in an object store, where ``latest-rank0.pt`` is a small file with another's name.
        path: The local file.

    Raises:
        InputError: It does not exist, or cannot be read.
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
    """Download a file; return False if it does not exist. If the store is unreachable, retry."""
    try:
        return download_existing(address, path)
    except Exception as error:
        raise InputError(
            f"{address}: cannot be read ({reason(error)}), so the newest checkpoint is unknown: a run in a store needs "
            "permission to read and list objects"
        ) from error


def open_store(address: str) -> tuple[ObjectStore, str]:
    """Return the store's client and the object key for an address."""
    store = maybe_create_object_store_from_uri(address)
    assert store is not None  # a run's store is one of Composer's
    return store, parse_uri(address)[2]


def list_names(address: str) -> list[str]:
    """Return the names of the files below a store's folder; the client's errors pass unchanged."""
    store, prefix = open_store(f"{address}/")
    return [key.removeprefix(prefix) for key in store.list_objects(prefix) if key != prefix]  # a console's empty folder


def upload(path: Path, address: str, denial_passes: bool = True) -> None:
    """Upload a file, and retry for ten minutes while the store is unreachable or denies it.

    Args:
        path: The file.
        address: Its address in the store.
        denial_passes: False for a run's first file: a denial that comes later may be a fault of the store's.

    Raises:
        RunError: The store cannot be written.
    """
    try:
        store, key = open_store(address)
        retry(lambda: store.upload_object(key, str(path)), address, RETRY_SECONDS, denial_passes=denial_passes)
    except Exception as error:
        raise RunError(f"{address}: cannot be written ({reason(error)})") from error


def upload_checkpoint(path: Path, address: str) -> None:
    """Upload a checkpoint to a run's folder in a store, then the pointer to it; see :func:`upload`."""
    upload(path, f"{address}/{path.name}")
    with TemporaryDirectory() as folder:
        create_symlink_file(parse_uri(f"{address}/{path.name}")[2], pointer := Path(folder) / STORED_POINTER)
        upload(pointer, f"{address}/{STORED_POINTER}")


def drop_unused_scaler(checkpoint: dict[str, Any], precision: str) -> None:
    """Remove the loss scaler's state from a checkpoint unless both the run that saved it and this one use amp_fp16.

    Only amp_fp16 scales its loss, with a class of its own. In other precisions the Trainer has a scaler too: on a CPU
    it is disabled and saves an empty state, on a GPU it is enabled and refuses an empty state.
    """
    state = checkpoint["state"]
    if "scaler" in state and not (precision == "amp_fp16" and state["scaler"].get("GradScaler")):
        del state["scaler"]
