"""Find the checkpoint from which a run resumes, bring the checkpoint to every node, and drop an unused loss scaler."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from composer.utils import dist

from d2v_composer.checkpoints.checkpoint import (
    LATEST,
    LOG,
    Checkpoint,
    CorruptCheckpointError,
    download,
    download_checkpoint,
    newest_first,
    read_checkpoint,
    stored_checkpoints,
)
from d2v_composer.checkpoints.saving import point_at, upload_checkpoint
from d2v_composer.models.provenance import Record
from d2v_composer.system.addresses import RunFolder
from d2v_composer.system.errors import InputError, reading
from d2v_composer.system.files import partial_file, sha256
from d2v_composer.system.processes import num_nodes
from d2v_composer.system.ranks import node_leaders_first, rank_zero_first

log = logging.getLogger(__name__)


# Not Composer's autoresume, which runs any code in the file that latest-rank0.pt points at, and takes a store that
# denies access for a store without checkpoints.
def find_newest(
    folder: RunFolder, accept: Callable[[Checkpoint], object], *, resumes: bool = True, uploads: bool = False
) -> Checkpoint | None:
    """Read a run's newest complete checkpoint, from the local folder or the store; ``None`` for a new run.

    Truncated and corrupt checkpoints are skipped with a warning. Afterwards, ``latest-rank0.pt`` points at the returned
    checkpoint.
    """
    pointer = folder.local / LATEST
    here = newest_first(
        (path.name for path in folder.local.glob("*.pt")), pointer.readlink().name if pointer.is_symlink() else None
    )
    there = [] if folder.address is None else stored_checkpoints(folder.address)
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
                download(f"{folder.address}/{LOG}", local_log)
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
        download(f"{folder.address}/{LOG}", local_log)
    return newest


@contextmanager
def _skipped_if_corrupt() -> Iterator[None]:
    try:
        yield
    except CorruptCheckpointError as error:
        log.warning("%s: skipped", error)


def share_newest(folder: RunFolder, resumes: bool, accept: Callable[[Checkpoint], None]) -> Checkpoint | None:
    """Bring the newest checkpoint to every node, and return it on every rank; return ``None`` for a new run.

    See :func:`find_newest` for the arguments and further errors.
    """
    on_several_nodes = num_nodes() > 1
    newest, shared = None, [("", "")]
    with rank_zero_first("the newest checkpoint"):
        if dist.get_global_rank() == 0:
            newest = find_newest(folder, accept, resumes=resumes, uploads=on_several_nodes)
            if newest is not None:
                shared = [(newest.path.name, sha256(newest.path) if on_several_nodes else "")]
    dist.broadcast_object_list(shared)
    name, digest = shared[0]
    if not name:
        return None
    path, address = folder.local / name, folder.address and f"{folder.address}/{name}"
    with node_leaders_first("the checkpoint"), reading(path):
        if on_several_nodes and dist.get_local_rank() == 0 and not (path.is_file() and sha256(path) == digest):
            if address is not None:
                download_checkpoint(address, path)
            if sha256(path) != digest:
                raise InputError(
                    f"{address or path} differs from the checkpoint with that name on node 0; "
                    "all nodes need the same save_folder, in a store or on a shared file system"
                )
        if newest is None:
            accept(newest := read_checkpoint(path))
        return newest


def drop_unused_scaler(checkpoint: Record, precision: str) -> None:
    """Remove the loss scaler's state from a checkpoint unless both the run that saved it and this run use amp_fp16."""
    # Only amp_fp16 scales the loss, with a scaler of its own class. In other precisions, the Trainer's scaler is
    # unused: on a CPU it is disabled and saves an empty state; on a GPU it is enabled and refuses an empty state.
    state = checkpoint["state"]
    if "scaler" in state and not (precision == "amp_fp16" and state["scaler"].get("GradScaler")):
        del state["scaler"]
