"""Find the checkpoint from which a run goes on: the same one on every rank."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from composer.core import Callback
from composer.utils import dist
from torch import nn

from d2v_composer.checkpoints.checkpoint import Checkpoint, download_checkpoint, find_newest, read_checkpoint
from d2v_composer.checkpoints.student_file import sha256
from d2v_composer.config.schema import TrainerConfig
from d2v_composer.models.trained import check_tensors
from d2v_composer.system.addresses import Address, RunFolder
from d2v_composer.system.errors import InputError, errors_of, reading
from d2v_composer.system.fetch import cache_folder
from d2v_composer.system.processes import num_nodes
from d2v_composer.system.ranks import node_leaders_first, rank_zero_first


def find_checkpoint(config: TrainerConfig, model: nn.Module, callbacks: Sequence[Callback]) -> Checkpoint | None:
    """Read the run's newest checkpoint or, for a new run, the one in ``load_path``.

    Args:
        config: The run's.
        model: What it trains.
        callbacks: Those that refuse a state of another run.

    Raises:
        InputError: It is corrupt, cannot be read, is another run's, leaves nothing to train, or ``recipes/train.py``
            did not write it; or the folder has one, and ``autoresume`` is false.
    """

    def accept(found: Checkpoint) -> None:
        """Check that the run may go on from a checkpoint, before a file is written or a tensor loaded."""
        with errors_of(str(found.path)):
            for callback in callbacks:  # another program has saved others: its tensors are compared
                if saved := found.saved_by(type(callback).__name__):
                    callback.load_state_dict(dict(saved))
            check_tensors(model, found.tensors, "")

    folder = config.run_folder
    if folder is not None and (newest := _share_newest(folder, config.autoresume, accept)) is not None:
        return newest
    if config.load_path is None:
        return None
    is_remote = Address.parse(config.load_path).is_remote
    cached = f"checkpoints/{hashlib.sha256(config.load_path.encode()).hexdigest()[:16]}.pt"
    path = cache_folder() / cached if is_remote else Path(config.load_path)
    with node_leaders_first("the checkpoint"), errors_of("load_path"):
        if is_remote and dist.get_local_rank() == 0:
            download_checkpoint(config.load_path, path)
        found, length = read_checkpoint(path), config.max_duration
    with reading(path):
        if found.trained({"ba": "batch", "ep": "epoch"}[length[-2:]]) >= int(length[:-2]):
            raise InputError(
                f"load_path: {config.load_path}: batch {found.trained('batch')} is not before max_duration {length}; "
                "set a larger max_duration"
            )
    accept(found)
    return found


def _share_newest(folder: RunFolder, resumes: bool, accept: Callable[[Checkpoint], None]) -> Checkpoint | None:
    """Bring rank 0's newest checkpoint to every node, and read it; ``None`` for a new run.

    Raises:
        InputError: A node cannot get it, or has another of that name: nodes would train different weights.
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
                raise InputError(f"{address or path} differs from the checkpoint with that name on node 0")
        if newest is None:
            accept(newest := read_checkpoint(path))
        return newest
