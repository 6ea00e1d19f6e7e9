"""The samples of an epoch and the shards that a node reads, as Streaming 0.13 chooses them for one data set.

Shapes: S shards, N samples, E ≤ N samples an epoch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Share", "draw_samples", "shards_of_node"]

# The chance per epoch below which an event is ignored.
UNLIKELY = 1e-9


def draw_samples(
    shard_sizes: NDArray[np.int64], num_drawn: int, pick_seed: int, sample_seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw the samples of an epoch, without repeats.

    The result equals that of :meth:`streaming.StreamingDataset.resample_streams` for a single stream, so that a resume
    continues with the samples of its checkpoint. Streaming's loop takes a second per million samples.

    Args:
        shard_sizes: (S,) the samples in each shard.
        num_drawn: E.
        pick_seed: The seed for the number of samples from each shard.
        sample_seed: The seed for the samples within a shard.

    Returns:
        The number of samples from each shard that has any, (at most S,), and the samples' ids in order, (E,).
    """
    num_samples = int(shard_sizes.sum())
    if num_drawn == num_samples:
        return shard_sizes, np.arange(num_samples)
    order = np.random.default_rng(pick_seed).permutation(num_samples)
    shard_of_sample = np.repeat(np.arange(len(shard_sizes)), shard_sizes)
    drawn_per_shard = np.bincount(shard_of_sample[order[:num_drawn]], minlength=len(shard_sizes))
    is_drawn = np.ones(num_samples, bool)
    begins = shard_sizes.cumsum() - shard_sizes
    rng = np.random.default_rng(sample_seed)
    for shard in np.flatnonzero(drawn_per_shard < shard_sizes):  # few: less than a batch is left out
        begin, size, drawn = int(begins[shard]), int(shard_sizes[shard]), int(drawn_per_shard[shard])
        is_drawn[begin : begin + size] = False
        if drawn:
            is_drawn[begin + rng.choice(size, drawn, False)] = True
    return drawn_per_shard[drawn_per_shard > 0], np.flatnonzero(is_drawn)


class Share(NamedTuple):
    """The part of a data set that a node reads."""

    node: int
    num_nodes: int
    num_canonical_nodes: int
    """The number of equal parts into which the order is cut."""
    shuffle_seed: int | None
    """``None``: the order is that of the index."""

    @property
    def canonical_nodes(self) -> Sequence[int]:
        """The parts of the order that the node reads; other nodes may read the same ones."""
        if self.num_canonical_nodes % self.num_nodes == 0:
            return range(self.node, self.num_canonical_nodes, self.num_nodes)
        if self.num_nodes % self.num_canonical_nodes == 0:
            return [self.node % self.num_canonical_nodes]
        return range(self.num_canonical_nodes)  # after a resume on such a number, any part may be any node's


def shards_of_node(shard_sizes: NDArray[np.int64], num_drawn: int, share: Share) -> NDArray[np.int64]:
    """Find the shards that a node reads, over all epochs.

    py1e shuffles the shards once per run, cuts their order into equal parts, and in each epoch shuffles within each
    part. So a part has the same shards in every epoch, except at its ends, which move with the samples that an epoch
    leaves out.

    Args:
        shard_sizes: (S,) the samples in each shard.
        num_drawn: E.
        share: The node's share.

    Returns:
        The shards' places in the index, ascending.
    """
    order = np.arange(len(shard_sizes))
    num_samples = int(shard_sizes.sum())
    num_left_out = num_samples - num_drawn
    if share.shuffle_seed is not None:
        # If an epoch leaves out all samples of a shard, the order of the others changes.
        if ((num_left_out / num_samples) ** shard_sizes).sum() > UNLIKELY:
            return order
        np.random.default_rng(share.shuffle_seed).shuffle(order)
    ends = shard_sizes[order].cumsum()
    begins = ends - shard_sizes[order]
    is_read = np.zeros(len(shard_sizes), bool)
    for part in share.canonical_nodes:
        begin = num_drawn * part // share.num_canonical_nodes
        end = -(-num_drawn * (part + 1) // share.num_canonical_nodes) + num_left_out
        is_read[order[(begins < end) & (ends > begin)]] = True
    return np.flatnonzero(is_read)
