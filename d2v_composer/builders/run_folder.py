"""Find the checkpoint that the Trainer loads."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from composer.core import Callback
from composer.utils import dist

from d2v_composer.checkpoints.resume import download_checkpoint, find_newest_checkpoint
from d2v_composer.checkpoints.safe_load import check_checkpoint, read_checkpoint
from d2v_composer.checkpoints.student_file import sha256
from d2v_composer.config.schema import TrainerConfig
from d2v_composer.models.distillation import check_tensors
from d2v_composer.system.addresses import Address, RunFolder
from d2v_composer.system.errors import InputError, errors_of, reading
from d2v_composer.system.fetch import cache_folder
from d2v_composer.system.processes import num_nodes
from d2v_composer.system.ranks import node_leaders_first, rank_zero_first


def build_load_path(config: TrainerConfig) -> str | None:
    """Return the run's newest checkpoint or, for a new run, the one in ``load_path``: verified, the same on every rank.

    Raises:
        InputError: It is corrupt, cannot be read, leaves nothing to train, or ``recipes/train.py`` did not write it; or
            the folder has one, and ``autoresume`` is false.
    """
    folder = config.run_folder
    if folder is not None and (newest := _find_newest(folder, config.autoresume)) is not None:
        return str(newest)
    if config.load_path is None:
        return None
    is_remote = Address.parse(config.load_path).is_remote
    cached = f"checkpoints/{hashlib.sha256(config.load_path.encode()).hexdigest()[:16]}.pt"
    path = cache_folder() / cached if is_remote else Path(config.load_path)
    with node_leaders_first("the checkpoint"):
        if dist.get_local_rank() == 0:
            if is_remote:
                download_checkpoint(config.load_path, path)
            with errors_of("load_path", InputError):
                check_checkpoint(path)
    length = config.max_duration
    with reading(path):
        trained = read_checkpoint(path)["state"]["timestamp"]["Timestamp"]
        if trained[{"ba": "batch", "ep": "epoch"}[length[-2:]]] >= int(length[:-2]):
            raise InputError(
                f"load_path: {config.load_path}: batch {trained['batch']} is not before max_duration {length}; set a "
                "larger one"
            )
    return str(path)


def _find_newest(folder: RunFolder, resumes: bool) -> Path | None:
    """Bring rank 0's newest checkpoint to every node, and return it; ``None`` for a new run.

    Raises:
        InputError: A node cannot get it, or has another of that name: nodes would train different weights.
    """
    on_several_nodes = num_nodes() > 1
    found: list[tuple[str, str] | None] = [None]
    with rank_zero_first("the newest checkpoint"):
        if dist.get_global_rank() == 0:
            newest = find_newest_checkpoint(folder, resumes=resumes, uploads=on_several_nodes)
            found = [newest and (newest.name, sha256(newest) if on_several_nodes else "")]
    dist.broadcast_object_list(found)
    if found[0] is None:
        return None
    name, digest = found[0]
    path, address = folder.local / name, folder.address and f"{folder.address}/{name}"
    with node_leaders_first("the checkpoint"):
        if on_several_nodes and dist.get_local_rank() == 0 and not (path.is_file() and sha256(path) == digest):
            if address is not None:
                download_checkpoint(address, path)
            with reading(path):
                if sha256(path) != digest:
                    raise InputError(f"{address or path}: differs from the checkpoint with that name on node 0")
    return path


def check_resume(load_path: str, model: torch.nn.Module, callbacks: Sequence[Callback]) -> None:
    """Compare the run with the checkpoint that it goes on from, before a file is written or a tensor loaded.

    Raises:
        InputError: Names the settings or tensors that differ.
    """
    with errors_of(load_path):
        state = read_checkpoint(load_path)["state"]
        for callback in callbacks:  # another program has saved others: its tensors are compared
            if (saved := state["callbacks"].get(type(callback).__name__)) is not None:
                callback.load_state_dict(saved)
        check_tensors(model, state["model"], "")
