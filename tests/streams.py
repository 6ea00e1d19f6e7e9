"""Open the training images, and read epochs of them, in the test's own process; the batches of any number of ranks."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from streaming.base.world import World
from torch import Tensor
from torch.utils.data import DataLoader

from d2v_composer.data.images import Images, RandomResizedCropFlip
from d2v_composer.sources.mds import Index
from d2v_composer.sources.shards import fetch_index
from d2v_composer.system.processes import die_with_parent
from d2v_composer.training_data.sampler import EpochOrder, StreamingSamples
from helpers import time_limit


def open_images(local: Path, remote: Path | str | None = None, **options: Any) -> StreamingSamples:
    """Crops of 24 pixels in batches of 16; an unreachable store is retried for a second."""
    if remote is not None and not (local / "index.json").exists():
        fetch_index(str(remote), local, 1)
    index = Index(local, Images(), remote=None if remote is None else str(remote))
    return StreamingSamples(index, RandomResizedCropFlip(24), **{"timeout": 1, "seed": 5, **options})


@contextmanager
def open_batches(dataset: StreamingSamples, workers: int) -> Iterator[Iterator[dict[str, Tensor]]]:
    """The batches of an epoch, whose workers end with the block; without that, a garbage collection waits for them."""
    options: dict[str, Any] = {}
    if workers:
        options = {"num_workers": workers, "worker_init_fn": lambda _: die_with_parent(), "timeout": 20}
    batches = iter(DataLoader(dataset, 16, sampler=dataset.order, **options))
    try:
        yield batches
    finally:
        if workers:
            with suppress(RuntimeError):  # a worker was killed
                batches._shutdown_workers()  # pyright: ignore[reportAttributeAccessIssue]


def read_epoch(dataset: StreamingSamples, workers: int = 0) -> list[int]:
    """The sample ids of an epoch, sorted."""
    with time_limit(30), open_batches(dataset, workers) as batches:
        return sorted(i for batch in batches for i in batch["sample_id"].tolist())


def global_batches(
    order: EpochOrder, epoch: int, nodes: int, ranks_per_node: int, first_sample: int = 0
) -> NDArray[np.int64]:
    """Return the samples of each global batch, (batches, nodes, samples of a node)."""
    worlds = [World(nodes, ranks_per_node, 1, rank) for rank in range(nodes * ranks_per_node)]
    drawn = order.draw(epoch)
    with patch.object(order, "draw", lambda _: drawn):  # once, not for each rank
        shares = np.array([order.samples_of_rank(epoch, first_sample, world) for world in worlds])
    by_batch = shares.reshape(len(worlds), -1, order.global_batch_size // len(worlds)).transpose(1, 0, 2)
    return by_batch.reshape(-1, nodes, order.global_batch_size // nodes)
