"""Changes to the insides of other packages, each with the version it was written for and the reason.

Composer 0.32.1, while :func:`patched_composer` is active:

- ``remote_uploader``, ``remote_uploader_downloader``: uploads run in processes that outlive SIGTERM, because a
  checkpoint is uploaded after the SIGTERM for which it was saved. Composer has no argument for it.
- ``dist.get_node_signal_file_name``: the name of a signal file includes the node. Composer gives all nodes the same
  name, and in a shared folder each node deletes the others' file.
- ``checkpoint._torch_load_with_validation``: checkpoints are read with ``weights_only``, as Composer does after 0.32.1
  (#3937). Composer 0.32.1 unpickles all that a file names.

Insides used only where they belong:

- ``models/transformer.py`` sets ``_fsdp_wrap`` and ``fsdp_wrap_fn`` (Composer 0.32.1): FSDP units are the encoder and
  the blocks.
- ``models/compilation.py`` sets options of torch 2.7's Dynamo and Inductor.
- ``checkpoints/safe_pickle.py`` subclasses Python's ``pickle._Unpickler``; ``checkpoints/torch_archive.py`` reads
  archives with torch 2.7's ``PyTorchFileReader``.
- ``system/multi_node.py`` uses the default store of torch 2.7's process group.
- ``system/temporary_folder.py`` removes a folder that torch 2.7 makes at import.
- ``system/s3_download.py`` reads botocore's ``_raw_stream``, because botocore's own reads block until full.
- ``callbacks/checkpoint_retention.py`` shortens the pause between a CheckpointSaver's checks of an upload, and sets
  the connection options of its S3 client (Composer 0.32.1).
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from composer.loggers import remote_uploader_downloader
from composer.utils import checkpoint, dist, remote_uploader

from d2v_composer.system.worker_lifetime import SPAWN

__all__ = ["patched_composer"]


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
