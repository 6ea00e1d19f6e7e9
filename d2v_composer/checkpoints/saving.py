"""Write and upload a run's checkpoints, and remove outdated checkpoints."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from composer.core import State
from composer.utils import dist
from composer.utils.checkpoint import save_checkpoint
from torch import Tensor

from d2v_composer.checkpoints.checkpoint import LATEST, LOG, STORED_POINTER, newest_first, stored_checkpoints
from d2v_composer.system.addresses import RunFolder
from d2v_composer.system.errors import reason, writing
from d2v_composer.system.fetch import list_names, open_store, put
from d2v_composer.system.files import flush, move

ADVICE = "earlier checkpoints are kept: resume with another precision, or start a new run with a lower optimizer.lr"

log = logging.getLogger(__name__)


def write_state(state: State, path: Path, publish: Callable[[Path, Path], None]) -> None:
    """Write a run's state to a partial file, which ``publish(partial, path)`` then renames on rank 0."""
    # A kill leaves a file that the next checkpoint replaces.
    partial = path.with_name("checkpoint.partial")
    with writing(path.parent):
        try:
            save_checkpoint(state, str(partial), ignore_keys=check_finite)  # a callable gets the contents
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        if dist.get_global_rank() == 0:
            publish(partial, path)


def publish(partial: Path, checkpoint: Path) -> None:
    """Rename a complete checkpoint, then make ``latest-rank0.pt`` point at it."""
    with suppress(FileNotFoundError):
        flush(checkpoint.with_name(LOG))  # a resumed run logs only what follows
    move(partial, checkpoint)
    point_at(checkpoint)


def point_at(checkpoint: Path) -> None:
    """Make the link ``latest-rank0.pt`` point at a checkpoint in the same folder."""
    pointer = checkpoint.with_name(".latest.partial")
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(checkpoint.name)
    pointer.replace(checkpoint.with_name(LATEST))
    flush(checkpoint.parent)


def prune(folder: Path, num_to_keep: int) -> None:
    """Remove the outdated checkpoints from a folder; see :func:`outdated`."""
    names = [path.name for path in folder.iterdir()]
    for name in outdated(names, (folder / LATEST).readlink().name, num_to_keep):
        (folder / name).unlink(missing_ok=True)


def prune_store(address: str, pointed_at: str, num_to_keep: int) -> None:
    """Remove the outdated checkpoints from a run's folder in a store if the store is S3; a failure is only logged."""
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
    """Return the names of checkpoints that are older than the ``num_to_keep`` newest; -1 keeps all.

    Checkpoints newer than ``pointed_at`` are neither counted nor returned.
    """
    return [] if num_to_keep < 0 else newest_first(names, pointed_at)[num_to_keep:]


def upload_checkpoint(path: Path, address: str) -> None:
    """Upload a checkpoint to a run's folder in a store, then the pointer file that names the checkpoint."""
    from composer.utils import parse_uri
    from composer.utils.file_helpers import create_symlink_file

    put(path, f"{address}/{path.name}", denial_passes=True)
    with TemporaryDirectory() as folder:
        create_symlink_file(parse_uri(f"{address}/{path.name}")[2], pointer := Path(folder) / STORED_POINTER)
        put(pointer, f"{address}/{STORED_POINTER}", denial_passes=True)


def upload_missing(folder: RunFolder) -> None:
    """Upload a run's newest checkpoint unless the store has it already."""
    newest = Path(os.path.realpath(folder.local / LATEST))
    if folder.address is not None and newest.exists() and newest.name not in stored_checkpoints(folder.address)[:1]:
        upload_checkpoint(newest, folder.address)


def check_finite(checkpoint: dict[str, Any]) -> None:
    """Check that the weights and the optimizer's state are finite; all ranks must call this function."""
    state = checkpoint["state"]
    tensors = named_tensors({part: state[part] for part in ("model", "optimizers")})
    mine = next((name for name, tensor in tensors if not tensor.isfinite().all()), None)
    if culprit := next((name for name in dist.all_gather_object(mine) if name is not None), None):
        batch = int(state["timestamp"]["Timestamp"]["batch"])
        raise FloatingPointError(f"batch {batch}: {culprit} has values that are not finite; {ADVICE}")


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested containers, each with the keys that lead to it, joined by dots."""
    if isinstance(value, Tensor):
        yield name.removeprefix("."), value
    elif isinstance(value, Mapping | list | tuple):
        for key, member in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from named_tensors(member, f"{name}.{key}")
