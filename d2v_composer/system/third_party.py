"""Changes to the insides of Composer 0.32.1, with the reason, while :func:`patched_composer` is active.

- ``remote_uploader``, ``remote_uploader_downloader``: upload processes die with the run. Composer has no
  argument for it.
- ``dist.get_node_signal_file_name``: the name of a signal file includes the node. Composer gives all nodes the same
  name, and in a shared folder each node deletes the others' file.
- ``checkpoint._torch_load_with_validation``: checkpoints are read with ``weights_only``, as Composer does after 0.32.1
  (#3937). Composer 0.32.1 unpickles all that a file names.

Insides of packages that are used only where they belong:

- ``models/transformer.py`` sets ``_fsdp_wrap`` and ``fsdp_wrap_fn`` (Composer 0.32.1): FSDP units are the encoder and
  the blocks. ``models/execution.py`` sets options of torch 2.7's Dynamo and Inductor.
- ``data/streaming.py`` calls Streaming 0.13.0's ``generate_work``, which orders the samples.
- ``system/ranks.py`` uses the default store of torch 2.7's process group; ``system/fetch.py`` botocore's
  ``_raw_stream``, because botocore's own reads block until full.
- ``callbacks/checkpointing.py`` shortens the pause between a CheckpointSaver's checks of an upload, and sets the
  connection options of its S3 client (Composer 0.32.1).
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from composer.loggers import remote_uploader_downloader
from composer.utils import checkpoint, dist, remote_uploader

from d2v_composer.system.processes import SPAWN


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
