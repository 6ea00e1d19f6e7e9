"""Order, read and augment training samples from MDS shards."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from streaming.base.sampling import get_sampling
from streaming.base.shuffle import get_shuffle
from streaming.base.world import World
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler
from typing_extensions import override

from d2v_composer.data.modality import Transform, collate, sample_rng
from d2v_composer.models.provenance import Record
from d2v_composer.sources.mds import Index
from d2v_composer.sources.shards import Shards
from d2v_composer.sources.source import Int64Array, whole_label
from d2v_composer.system.errors import InputError

# A shard is fetched at most this many samples of a rank before it is needed.
AHEAD = 8192
# At the start of an epoch, the distance grows by this many samples with each sample, up to AHEAD: so all workers share
# the fetching of the first shards.
OPENING = 32


class Sample(NamedTuple):
    """A request for one sample."""

    epoch: int
    sample_id: int
    ahead: tuple[int, ...]
    """Indices of the shards to fetch in advance."""


class EpochOrder(DistributedSampler[Sample]):
    """The order of this rank's samples; each iteration is the next epoch.

    The global batches are the same for any number of nodes, ranks and workers. With ``lengths`` and
    ``shuffle``, the samples of a batch have similar lengths.

    Args:
        shard_sizes: Number of samples in each shard, (S,).
        shuffle: Shuffle the samples, differently in each epoch.
        seed: The seed of the order.
        shuffle_block_size: Approximate number of samples that are mixed with each other.
        num_canonical_nodes: Number of equal parts into which the order is cut.
        epoch_size: Number of samples in an epoch, divisible by ``num_canonical_nodes``; default: all samples.
        lengths: Length of each augmented sample, (N,); ``None`` if all samples have one size.
        global_batch_size: Batch size of all ranks together; used only with ``lengths``.
    """

    def __init__(
        self,
        shard_sizes: Int64Array,
        *,
        shuffle: bool = True,
        seed: int,
        shuffle_block_size: int = 1 << 16,
        num_canonical_nodes: int = 1,
        epoch_size: int | None = None,
        lengths: Int64Array | None = None,
        global_batch_size: int = 1,
    ) -> None:
        # Composer accepts no other class of samplers on several ranks; of its methods, none is left.
        num_samples = int(shard_sizes.sum())
        super().__init__(range(num_samples), num_replicas=1, rank=0)  # pyright: ignore[reportArgumentType]
        self.shard_sizes, self.num_canonical_nodes = shard_sizes, num_canonical_nodes
        self.epoch_size = epoch_size or num_samples
        self.shuffle, self.seed, self.shuffle_block_size = shuffle, seed, shuffle_block_size
        self.lengths, self.global_batch_size = lengths, global_batch_size
        self.resume(0, 0)

    @override
    def __len__(self) -> int:
        """Return the number of this rank's samples in a whole epoch."""
        return math.ceil(self.epoch_size / World.detect().num_ranks)

    @override
    def __iter__(self) -> Iterator[Sample]:
        """Return the samples of the next epoch, or the rest of a resumed epoch."""
        if self._is_begun:
            self.current_epoch, self._first_sample = self.current_epoch + 1, 0
        self._is_begun = True
        ids = self.samples_of_rank(self.current_epoch, self._first_sample, World.detect())
        shards = np.searchsorted(self.shard_sizes.cumsum(), ids, side="right")
        return self._with_shards_ahead(self.current_epoch, ids.tolist(), shards.tolist())

    def samples_of_rank(self, epoch: int, first_sample: int, world: World) -> Int64Array:
        """Return the indices of a rank's samples in an epoch, without the epoch's first ``first_sample`` samples."""
        left = self.draw(epoch)[first_sample:].reshape(-1, world.ranks_per_node, world.num_nodes)
        return left[:, world.rank_of_node, world.node]

    def draw(self, epoch: int) -> Int64Array:
        """Return the indices of an epoch's samples, (``epoch_size``,), of all ranks, in the order of training."""
        sizes, rng = self.shard_sizes, np.random.default_rng(self.seed + epoch)
        # Without shuffle, all epochs leave the same samples out.
        counts = get_sampling(sizes, self.epoch_size, 1, self.seed, epoch, self.shuffle)
        parts = [
            begin + (np.arange(count) if count in (0, size) else np.sort(rng.choice(size, count, replace=False)))
            for begin, size, count in zip(sizes.cumsum() - sizes, sizes, counts, strict=True)
        ]
        order, nodes = np.concatenate(parts), self.num_canonical_nodes
        if self.shuffle:
            order = order[get_shuffle("py1e", counts[counts > 0], nodes, self.seed, epoch, self.shuffle_block_size)]
        order = order.reshape(nodes, -1)
        if self.shuffle and self.lengths is not None:
            order = self._by_length(order, self.lengths, epoch)
        return order.T.ravel()

    def _by_length(self, order: Int64Array, lengths: Int64Array, epoch: int) -> Int64Array:
        """Sort each canonical node's samples, (nodes, samples), by length in windows, and shuffle their batches."""
        # A window has about shuffle_block_size samples of all nodes together.
        node_batch, windows = self.global_batch_size // len(order), []
        size = max(1, self.shuffle_block_size // self.global_batch_size) * node_batch
        for begin in range(0, order.shape[1], size):
            window = order[:, begin : begin + size]
            rng = np.random.default_rng((self.seed, epoch, begin))
            by_length = np.lexsort((rng.random(window.shape), lengths[window]))
            window = np.take_along_axis(window, by_length, axis=1).reshape(len(order), -1, node_batch)
            windows.append(rng.permutation(window, axis=1))
        return np.concatenate(windows, axis=1).reshape(len(order), -1)

    def resume(self, epoch: int, sample_in_epoch: int) -> None:
        """Start the next iteration after this many samples of an epoch, counted over all ranks."""
        # Not self.epoch, which Composer sets.
        self.current_epoch, self._first_sample, self._is_begun = epoch, sample_in_epoch, False

    @staticmethod
    def _with_shards_ahead(epoch: int, ids: list[int], shards: list[int]) -> Iterator[Sample]:
        begin = 0
        for i, sample_id in enumerate(ids):
            end = i + 1 + min(AHEAD, OPENING * (i + 1))
            yield Sample(epoch, sample_id, tuple(dict.fromkeys(shards[begin:end])))
            begin = end


def padded_sizes(lengths: Int64Array) -> list[int]:
    """Return at most 16 lengths to which batches are padded, ascending, given the lengths of all samples, (N,)."""
    ascending = np.sort(lengths)
    # Sizes are equally far apart on this scale: the share of all sound that is in shorter clips, and, with half its
    # weight, the length, so that few long clips get sizes, too.
    scale = ascending.cumsum() / ascending.sum() + ascending / (2 * ascending[-1])
    chosen = np.searchsorted(scale, np.linspace(scale[0], scale[-1], 17)[1:-1])
    return np.unique(np.append(ascending[chosen], ascending[-1])).tolist()


def collate_clips(samples: Sequence[dict[str, Any]], name: str, sizes: Sequence[int]) -> dict[str, Tensor]:
    """Return a batch of clips: ``name``, (B, L) float32; ``sample_id``, (B,); and, with padding, ``lengths``, (B,)."""
    inputs, *lengths = collate([sample[name] for sample in samples], sizes)
    sample_ids = torch.tensor([sample["sample_id"] for sample in samples])
    return {name: inputs, "sample_id": sample_ids} | ({"lengths": lengths[0]} if lengths else {})


class OrderedSamples(Dataset[Any]):
    """A data set whose ``order`` is a DataLoader's sampler, with a state for checkpoints."""

    order: EpochOrder

    def state_dict(self, num_samples: int, from_beginning: bool) -> Record:
        """Return the state after ``num_samples`` samples of the epoch, counted over all ranks."""
        assert from_beginning
        return {"epoch": self.order.current_epoch, "sample_in_epoch": num_samples}

    def load_state_dict(self, state: Record) -> None:
        """Resume an epoch from a state."""
        self.order.resume(**state)


class StreamingSamples(OrderedSamples):
    """Augmented samples from a column of an MDS data set; ``DataLoader(dataset, sampler=dataset.order)`` reads epochs.

    A sample is a dict with ``image``, (3, height, width) uint8, or ``audio``, (L,) float32, and
    ``sample_id``, the sample's index. If the index has labels, a sample is a tuple of the image or audio, and the
    label. The augmentation depends only on the seed, the epoch and the sample's index.

    Args:
        index: Index of the data set, which names the columns to read.
        transform: The augmentation.
        seed: The seed of the order and of the augmentation.
        num_classes: Number of classes, if the index has labels.
        cache_limit: Maximum size of the cache of a remote data set, in bytes; default: no limit.
        timeout: Seconds for which an unreachable store is retried.
        **order: Further arguments of :class:`EpochOrder`.

    Attributes:
        order: The sampler.
    """

    def __init__(
        self,
        index: Index,
        transform: Transform,
        *,
        seed: int,
        num_classes: int = 1,
        cache_limit: int | None = None,
        timeout: float = 600.0,
        **order: Any,
    ) -> None:
        self.index, self.transform, self.seed, self.num_classes = index, transform, seed, num_classes
        self.shards = Shards(index, cache_limit=cache_limit, timeout=timeout)
        self.order = EpochOrder(np.array([shard.samples for shard in index.shards]), seed=seed, **order)

    def __len__(self) -> int:
        return len(self.index)

    @override
    def __getitem__(self, sample: Sample) -> Any:
        """Return one augmented sample."""
        epoch, sample_id, ahead = sample
        index, source = self.index, f"sample {sample_id} of {self.index.folder}"
        self.shards.fetch_ahead(ahead)
        stored = self.shards[sample_id]
        values = self.transform(stored[index.column], sample_rng(self.seed, epoch, sample_id), source)
        if index.labels is None:
            return {index.modality.name: values, "sample_id": sample_id}
        label = whole_label(stored[index.labels], source)
        if not 0 <= label < self.num_classes:
            raise InputError(f"{source}: its label must be a number from 0 to {self.num_classes - 1}, got {label}")
        return values, label
