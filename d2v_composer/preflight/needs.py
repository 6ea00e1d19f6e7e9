"""The needs of a whole run, from the pace of its rehearsal."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from composer.core import Time, TimeUnit
from streaming.base.util import bytes_to_int

from d2v_composer.builders.data import room_of_node
from d2v_composer.config.schema import TrainConfig
from d2v_composer.data.labelled_sets import LabelledSet
from d2v_composer.preflight.checks import DataSet
from d2v_composer.preflight.nodes import Nodes
from d2v_composer.preflight.rehearsal import IMAGES_PER_SET

__all__ = ["Measured", "needs"]

HOUR = 3600


class Measured(NamedTuple):
    """Figures of the rehearsal."""

    images_per_second: float
    """Over all ranks, without evaluations."""
    data_wait: float
    """The share of the time spent waiting for images, from 0 to 1."""
    evaluation_seconds: float
    """One retrieval of the small sets."""
    gpu_gigabytes: float
    """The most that one GPU's allocator reserved; 0 without GPU."""
    process_bytes: int
    """The most that this node's processes held."""
    decoded_per_core: float
    """Images that one core decodes and augments in a second."""
    checkpoint_bytes: int

    @classmethod
    def from_log(
        cls, logged: Mapping[str, Mapping[int, float]], process_bytes: int, decoded_per_core: float, checkpoint: Path
    ) -> "Measured":
        """The figures of a log, and those that stand in none."""

        def last(key: str) -> float:
            return list(logged.get(key, {0: 0.0}).values())[-1]

        return cls(
            last("throughput/images_per_sec"),
            last("throughput/data_wait"),
            last("time/zero_shot_retrieval"),
            max(logged.get("memory/peak_reserved_mem", {0: 0.0}).values()),
            process_bytes,
            decoded_per_core,
            checkpoint.stat().st_size,
        )


def needs(
    config: TrainConfig, nodes: Nodes, data: DataSet, sets: Mapping[str, LabelledSet], measured: Measured
) -> Iterator[str]:
    """What the whole run will need, a line each."""
    batch_size, num_ranks = config.global_train_batch_size, nodes.num_nodes * nodes.ranks_per_node
    per_epoch = data.num_samples // batch_size
    batches = in_batches(config.max_duration, 0, per_epoch)
    images, pace = batches * batch_size, measured.images_per_second
    yield f"pace          {pace:,.0f} images/s on {num_ranks} ranks, {measured.data_wait:.0%} of it waiting for data"

    evaluations = batches // in_batches(config.retrieval.interval, batches, per_epoch) if sets else 0
    larger = sum(sum(each.num_images) for each in sets.values()) / (2 * IMAGES_PER_SET * len(sets)) if sets else 0.0
    evaluating = evaluations * measured.evaluation_seconds * max(larger, 1.0)
    hours = (images / pace + evaluating) / HOUR
    device = "GPU" if torch.cuda.is_available() else "rank"
    yield (
        f"time          {hours:.1f} h for {batches:,} batches, {evaluating / HOUR:.1f} h of it in {evaluations} "
        f"retrievals (at most): {hours * num_ranks:.1f} {device}-hours"
    )

    saved = batches // in_batches(config.save_interval, batches, per_epoch) + 1
    size, kept = measured.checkpoint_bytes / 1e6, config.save_num_checkpoints_to_keep
    yield (
        f"checkpoints   {saved} of {size:,.0f} MB, {'all' if kept < 0 else kept} kept: "
        f"{size * (saved if kept < 0 else min(kept + 1, saved)) / 1e3:.1f} GB at most at a time"
    )
    if config.train_loader.remote is not None:
        yield f"store         {from_store(config, nodes, data, batches / per_epoch)}"
    if measured.gpu_gigabytes:
        total = torch.cuda.get_device_properties(0).total_memory / 1e9
        yield f"GPU memory    {measured.gpu_gigabytes:.1f} GB of {total:.0f} GB reserved at the peak"
    yield f"memory        {measured.process_bytes / 1e9:.1f} GB of this node's processes at the peak"

    needed = pace / (1 - min(measured.data_wait, 0.99)) / nodes.num_nodes
    yield (
        f"data workers  {needed / measured.decoded_per_core:.1f} cores a node decode the {needed:,.0f} images/s that "
        f"its ranks could take; asked for: {config.train_loader.num_workers * nodes.ranks_per_node} workers"
    )


def in_batches(text: str, total: int, per_epoch: int) -> int:
    """A duration in batches, at least one; a share is one of ``total``."""
    time = Time.from_timestring(text)
    if time.unit == TimeUnit.EPOCH:
        return max(int(time.value) * per_epoch, 1)
    if time.unit == TimeUnit.DURATION:
        return max(round(time.value * total), 1)
    return max(int(time.value), 1)


def from_store(config: TrainConfig, nodes: Nodes, data: DataSet, epochs: float) -> str:
    """The bytes that the run reads from the store, in words."""
    limit = bytes_to_int(config.train_loader.cache_limit or 0)
    if limit and limit < data.num_bytes:
        return f"up to {data.num_bytes * epochs / 1e9:,.1f} GB read by each node: cache_limit holds a part of an epoch"
    to_come = room_of_node(config, data.shards, nodes.rank, nodes.num_nodes).bytes
    return f"{to_come / 1e9:,.1f} GB read once by each node, {data.num_bytes / 1e9:,.1f} GB in the store"
