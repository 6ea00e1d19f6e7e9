"""Compute the needs of a whole run from the pace of its rehearsal."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from composer.core import Time, TimeUnit
from streaming.base.util import bytes_to_int

from d2v_composer.builders.data import count_samples, room_of_node
from d2v_composer.preflight.checks import Checks
from d2v_composer.preflight.rehearsal import IMAGES_PER_SET

__all__ = ["Measured", "in_batches", "needs"]

HOUR = 3600


class Measured(NamedTuple):
    """The figures of the rehearsal."""

    images_per_second: float
    """The pace of all ranks together, without evaluations."""
    data_wait: float
    """The share of the time spent waiting for images, from 0 to 1."""
    evaluation_seconds: float
    """The time of one retrieval of the small sets."""
    gpu_gigabytes: float
    """The most that the allocator of one GPU reserved; 0 without a GPU."""
    process_bytes: int
    """The most memory that this node's processes held."""
    checkpoint_bytes: int

    @classmethod
    def from_log(cls, logged: Mapping[str, Mapping[int, float]], process_bytes: int, checkpoint: Path) -> "Measured":
        """Read the figures of a log, and the size of a checkpoint."""

        def values(key: str) -> list[float]:
            return list(logged.get(key, {0: 0.0}).values())

        return cls(
            values("throughput/images_per_sec")[-1],
            values("throughput/data_wait")[-1],
            values("time/zero_shot_retrieval")[-1],
            max(values("memory/peak_reserved_mem")),
            process_bytes,
            checkpoint.stat().st_size,
        )


def needs(checks: Checks, measured: Measured) -> Iterator[str]:
    """Yield what the whole run will need, a line each."""
    config, nodes, sets = checks.config, checks.nodes, checks.sets
    batch_size, num_ranks = config.global_train_batch_size, nodes.num_nodes * nodes.ranks_per_node
    per_epoch = count_samples(checks.shards) // batch_size
    batches = in_batches(config.max_duration, 0, per_epoch)
    pace = measured.images_per_second
    yield f"pace          {pace:,.0f} images/s on {num_ranks} rank(s), {measured.data_wait:.0%} of it waiting for data"

    evaluations = batches // in_batches(config.retrieval.interval, batches, per_epoch) if sets else 0
    larger = sum(sum(each.num_images) for each in sets.values()) / (2 * IMAGES_PER_SET * len(sets)) if sets else 0.0
    evaluating = evaluations * measured.evaluation_seconds * max(larger, 1.0)
    hours = (batches * batch_size / pace + evaluating) / HOUR
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
        yield f"store         {_from_store(checks, batches / per_epoch)}"
    if measured.gpu_gigabytes:
        total = torch.cuda.get_device_properties(0).total_memory / 1e9
        yield f"GPU memory    {measured.gpu_gigabytes:.1f} GB of {total:.0f} GB reserved at the peak"
    yield f"memory        {measured.process_bytes / 1e9:.1f} GB of this node's processes at the peak"

    needed = pace / (1 - min(measured.data_wait, 0.99)) / nodes.num_nodes
    yield (
        f"data workers  {needed / checks.decoded_per_core:.1f} cores per node decode the {needed:,.0f} images/s that "
        f"its ranks could train on; configured: {config.train_loader.num_workers * nodes.ranks_per_node} worker(s)"
    )


def in_batches(text: str, total: int, per_epoch: int) -> int:
    """Convert a duration to batches, at least one; ``dur`` is a share of ``total``."""
    time = Time.from_timestring(text)
    if time.unit == TimeUnit.EPOCH:
        return max(int(time.value) * per_epoch, 1)
    if time.unit == TimeUnit.DURATION:
        return max(round(time.value * total), 1)
    return max(int(time.value), 1)


def _from_store(checks: Checks, epochs: float) -> str:
    config, total = checks.config, checks.num_bytes
    limit = bytes_to_int(config.train_loader.cache_limit or 0)
    if limit and limit < total:
        return f"up to {total * epochs / 1e9:,.1f} GB read by each node: cache_limit holds a part of an epoch"
    to_come = room_of_node(config, checks.shards, checks.nodes.rank, checks.nodes.num_nodes).bytes
    return f"{to_come / 1e9:,.1f} GB read once by each node, {total / 1e9:,.1f} GB in the store"
