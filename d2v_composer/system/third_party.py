"""Changes to the insides of Composer 0.32.1, with the reason.

While :func:`patched_composer` is active:

- ``dist.get_node_signal_file_name``: the name of a signal file includes the node. Composer gives all nodes the same
  name, and in a shared folder each node deletes the others' file.
- ``checkpoint._torch_load_with_validation``: checkpoints are read with ``weights_only``, as Composer does after 0.32.1
  (#3937). Composer 0.32.1 unpickles all that a file names.
- ``fsdp2.fully_shard``: the caller's, to which Composer gives no choice.

Insides of packages that are used only where they belong:

- ``models/transformer.py`` sets ``_fsdp_wrap`` and ``fsdp_wrap_fn`` (Composer 0.32.1): FSDP units are the encoder and
  the blocks. ``models/execution.py`` sets options of torch 2.7's Dynamo and Inductor.
- ``data/streaming.py`` calls Streaming 0.13.0's ``generate_work``, which orders the samples.
- ``system/ranks.py`` uses the default store of torch 2.7's process group; ``system/fetch.py`` botocore's
  ``_raw_stream``, because botocore's own reads block until full.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from composer.distributed import fsdp2
from composer.utils import checkpoint, dist


@contextmanager
def patched_composer(
    read_checkpoint: Callable[..., Any], fully_shard: Callable[..., Any] = fsdp2.fully_shard
) -> Iterator[None]:
    """Apply the patches of Composer to a Trainer that is constructed within the block.

    Args:
        read_checkpoint: Loads a checkpoint, given its path and, by keyword, torch.load's ``map_location``.
        fully_shard: Shards a module, like torch's.
    """
    common_name = dist.get_node_signal_file_name

    def name_of_this_node(rng: random.Random | None = None) -> str:
        return f"{common_name(rng)}_{dist.get_node_rank()}"

    with (
        patch.object(dist, "get_node_signal_file_name", name_of_this_node),
        patch.object(checkpoint, "_torch_load_with_validation", read_checkpoint),
        patch.object(fsdp2, "fully_shard", fully_shard),
    ):
        yield
