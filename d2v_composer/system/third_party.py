"""Warnings of other packages that no user can act on: each with its source and the reason to hide it."""

import atexit
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

from composer.loggers import remote_uploader_downloader
from composer.utils import checkpoint, dist, remote_uploader
from streaming.base import dataset as streaming_dataset
from streaming.base.shared import SharedMemory, array, prefix

from d2v_composer.system.processes import SPAWN

# MERGED FROM d2v_composer/system/third_party.py: Changes to the insides of other packages, each with the version


@contextmanager
def patched_composer(read_checkpoint: Callable[..., Any]) -> Iterator[None]:
    """Apply the patches of Composer to a Trainer that is constructed within the block.

    Args:
        read_checkpoint: Loads a checkpoint, given its path and, by keyword, torch.load's ``map_location``.
    """
    multiprocessing_of_uploads = SimpleNamespace(get_context=lambda method: SPAWN)
    common_name = dist.get_node_signal_file_name

    def name_of_this_node(rng: random.Random | None = None) -> str:
        return f"{common_name(rng)}_{dist.get_node_rank()}"

    with (
        patch.object(remote_uploader, "multiprocessing", multiprocessing_of_uploads),
        patch.object(remote_uploader_downloader, "multiprocessing", multiprocessing_of_uploads),
        patch.object(dist, "get_node_signal_file_name", name_of_this_node),
        patch.object(checkpoint, "_torch_load_with_validation", read_checkpoint),
    ):
        yield


def shared_memory_name(number: int, name: str) -> str:
    """Return Streaming's name for shared memory or a lock of the data set with this number."""
    return prefix._get_path(number, name)


@contextmanager
def named_shared_memory(
    number: int, folder: Path, opened: list[SharedMemory], check: Callable[[], None]
) -> Iterator[None]:
    """Give a StreamingDataset that is made within the block a number for its shared memory and a folder for its locks.

    Args:
        number: The number, with which the names of shared memory and locks begin.
        folder: The folder for locks.
        opened: The list to which the shared memory is added.
        check: Called once the index is read, before any shared memory is made.
    """

    def get_shm_prefix(*_: Any, **__: Any) -> tuple[int, None]:
        check()
        return number, None  # Streaming's list of folders in use, which only its own search for a number reads

    with (
        patch.object(streaming_dataset, "get_shm_prefix", get_shm_prefix),
        patch.object(streaming_dataset, "gettempdir", lambda: str(folder)),
        recorded_shared_memory(array, opened),
    ):
        yield


@contextmanager
def recorded_shared_memory(module: ModuleType, opened: list[SharedMemory]) -> Iterator[None]:
    """Add to a list the shared memory that a module of Streaming opens within the block."""

    def open_shared_memory(*args: Any, **kwargs: Any) -> SharedMemory:
        opened.append(SharedMemory(*args, **kwargs))
        return opened[-1]

    with patch.object(module, "SharedMemory", open_shared_memory):
        yield


def remove_shared_memory(opened: list[SharedMemory]) -> None:
    """Remove shared memory that this process created, and empty the list. It is closed with the last array on it."""
    while opened:
        memory = opened.pop()
        atexit.unregister(memory.cleanup)
        for created in memory.created_shms:
            with suppress(FileNotFoundError):
                created.unlink()
