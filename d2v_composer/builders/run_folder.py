"""Find the run's folder, and the checkpoint in it from which the run resumes."""

import hashlib
from pathlib import Path

from composer.utils import dist

from d2v_composer.checkpoints.composer_checkpoint import check_checkpoint
from d2v_composer.checkpoints.resume import bring_checkpoint, fetch_checkpoint, find_newest_checkpoint
from d2v_composer.config.schema import TrainConfig
from d2v_composer.system.addresses import Address, RunFolder, check_path
from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import cache_folder
from d2v_composer.system.multi_node import node_leaders_first, rank_zero_first

__all__ = ["build_load_path", "fetched_path", "find_run_folder"]


def build_load_path(config: TrainConfig) -> str | None:
    """The checkpoint that the Trainer is to load: the run's own newest one, or else that of ``load_path``.

    The first node chooses, and all take the same; whichever it is was looked through beforehand.

    Raises:
        InputError: It is not whole, was not written by ``recipes/train.py``, or cannot be read.
    """
    folder, load_path = find_run_folder(config), config.load_path
    newest = None
    if config.autoresume and folder is not None:
        chosen: list[str | None] = [None]
        with rank_zero_first("the newest checkpoint"):
            if dist.get_global_rank() == 0:
                found = find_newest_checkpoint(folder.local, folder.address)
                chosen = [None if found is None else found.name]
        dist.broadcast_object_list(chosen)
        newest = chosen[0]
    is_remote = load_path is not None and Address.parse(load_path).is_remote
    path = None if load_path is None else fetched_path(load_path) if is_remote else Path(load_path)
    with node_leaders_first("the checkpoint"):
        is_first = dist.get_local_rank() == 0
        if newest is not None:
            assert folder is not None  # there was one to look in
            path = folder.local / newest
            if is_first and dist.get_global_rank() != 0:  # the first node has it, and has read all of it
                bring_checkpoint(newest, folder.local, folder.address)
        elif is_first and load_path is not None and path is not None:
            if is_remote:
                fetch_checkpoint(load_path, path)
            check_checkpoint(path)
    return None if path is None else str(path)


def fetched_path(load_path: str) -> Path:
    """Where a remote checkpoint is kept on this machine.

    Raises:
        InputError: Composer would look elsewhere.
    """
    path = cache_folder() / "checkpoints" / f"{hashlib.sha256(load_path.encode()).hexdigest()[:16]}.pt"
    try:
        check_path(str(path))
    except ValueError as error:
        raise InputError(f"TORCH_HOME: {error}") from error
    return path


def find_run_folder(config: TrainConfig) -> RunFolder | None:
    """Where the run's files are; ``None`` where nothing is saved."""
    return None if config.save_folder is None else RunFolder.parse(config.save_folder)
