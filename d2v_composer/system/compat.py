"""Changes to the insides of other packages, each with the version it was written for and the reason.

Composer 0.32.1, while :func:`patched_composer` is active:

- ``remote_uploader``, ``remote_uploader_downloader``: uploads run in processes that outlive SIGTERM, because a
  checkpoint is uploaded after the SIGTERM for which it was saved. Composer has no argument for it.
- ``dist.get_node_signal_file_name``: the name of a signal file includes the node. Composer gives all nodes the same
  name, and in a shared folder each node deletes the others' file.
- ``checkpoint._torch_load_with_validation``: checkpoints are read with ``weights_only``, as Composer does after 0.32.1
  (#3937). Composer 0.32.1 unpickles all that a file names.

Streaming 0.13.0:

- :func:`named_shared_memory`: a data set's shared memory gets a given number, and its locks a given folder. Streaming
  looks for a free number and takes it a moment later, so that runs which start at the same time can take the same one;
  and it puts the locks into TMPDIR, which the ranks of a run need not have in common.
- :func:`recorded_shared_memory`: Streaming keeps shared memory open until the process ends, so that a process which
  makes many data sets, or resumes many epochs, runs out of descriptors.

Insides used only where they belong:

- ``models/transformer.py`` sets ``_fsdp_wrap`` and ``fsdp_wrap_fn`` (Composer 0.32.1): FSDP units are the encoder and
  the blocks.
- ``models/compilation.py`` sets options of torch 2.7's Dynamo and Inductor, and removes Inductor's wait at exit.
- ``checkpoints/safe_pickle.py`` subclasses Python's ``pickle._Unpickler``; ``checkpoints/torch_archive.py`` reads
  archives with torch 2.7's ``PyTorchFileReader``.
- ``system/multi_node.py`` uses the default store of torch 2.7's process group.
- ``system/temporary_folder.py`` removes a folder that torch 2.7 makes at import.
- ``system/s3_download.py`` reads botocore's ``_raw_stream``, because botocore's own reads block until full.
- ``data/verified_dataset.py`` overrides ``_resume`` of Streaming's StreamingDataset, and uses its shared arrays.
- ``callbacks/tensorboard_logger.py`` overrides ``_flush`` of Composer's TensorboardLogger, which uploads to a bucket's
  root (Composer 0.32.1).
- ``callbacks/checkpoint_retention.py`` shortens the pause between a CheckpointSaver's checks of an upload, and sets
  the connection options of its S3 client (Composer 0.32.1).
"""

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

from d2v_composer.system.worker_lifetime import SPAWN

__all__ = [
    "named_shared_memory",
    "patched_composer",
    "recorded_shared_memory",
    "remove_shared_memory",
    "shared_memory_name",
]


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
