"""Stream training samples from MDS shards: their order, and the augmented samples."""

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
    """A request for one sample, from the main process to a worker."""

    view: int
    """Number of the augmentation: the epoch or, with K fixed views, epoch mod K."""
    sample_id: int
    ahead: tuple[int, ...]
    """Numbers of the shards that will be needed soon."""


class EpochOrder(DistributedSampler[Sample]):
    """This rank's samples, in order; each iteration is the next epoch.

    The order is Streaming's, and its samples go to the nodes and ranks in turn, as Streaming deals them. So the batches
    of all ranks together are the same for any number of nodes and ranks. The order is drawn in the main process, and
    workers have no state: any number of workers, even if a resume changes it, reads the same batches.

    With ``lengths``, samples of similar length come together: each canonical node's order is cut into windows, of about
    ``shuffle_block_size`` samples on all nodes together. Within a window, a node's samples are sorted by length and cut
    into its parts of the global batches. Parts at the same position form a batch, and the window's batches are
    shuffled.

    Args:
        shard_sizes: Number of samples in each shard, (S,).
        shuffle: Shuffle the samples, differently in each epoch.
        seed: The seed of the order.
        shuffle_block_size: Number of samples that are mixed with each other. The shards of as many samples are in use
            at a time.
        num_canonical_nodes: Number of equal parts into which the order is cut. If it is a multiple of the number of
            nodes, each node needs only its own shards.
        epoch_size: Number of samples in an epoch; with ``shuffle``, other ones in each epoch or view. The default, all,
            is also the most, since Streaming would repeat samples. Must be divisible by ``num_canonical_nodes``.
        views: Number K of fixed views of each sample: each epoch has the samples and views of the K-th epoch before it,
            in a new order. ``None``: new views in each epoch.
        lengths: Length of each sample in a batch, before padding, (N,); ``None`` if all have one size.
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
        views: int | None = None,
        lengths: Int64Array | None = None,
        global_batch_size: int = 1,
    ) -> None:
        # Composer accepts no other class of samplers on several ranks; of its methods, none is left.
        num_samples = int(shard_sizes.sum())
        super().__init__(range(num_samples), num_replicas=1, rank=0)  # pyright: ignore[reportArgumentType]
        self.shard_sizes, self.num_canonical_nodes = shard_sizes, num_canonical_nodes
        self.epoch_size, self.views = epoch_size or num_samples, views
        self.shuffle, self.seed, self.shuffle_block_size = shuffle, seed, shuffle_block_size
        self.lengths, self.global_batch_size = lengths, global_batch_size
        self.resume(0, 0)

    @override
    def __len__(self) -> int:
        """Return this rank's number of samples in a whole epoch."""
        return math.ceil(self.epoch_size / World.detect().num_ranks)

    @override
    def __iter__(self) -> Iterator[Sample]:
        """Return the samples of the next epoch, or the rest of a resumed epoch."""
        if self._is_begun:
            self.current_epoch, self._first_sample = self.current_epoch + 1, 0
        self._is_begun = True
        ids = self.samples_of_rank(self.current_epoch, self._first_sample, World.detect())
        shards = np.searchsorted(self.shard_sizes.cumsum(), ids, side="right")
        return self._with_shards_ahead(self._view_of(self.current_epoch), ids.tolist(), shards.tolist())

    def samples_of_rank(self, epoch: int, first_sample: int, world: World) -> Int64Array:
        """Return the numbers of a rank's samples in an epoch, after the first ``first_sample`` samples of all ranks."""
        left = self.draw(epoch)[first_sample:].reshape(-1, world.ranks_per_node, world.num_nodes)
        return left[:, world.rank_of_node, world.node]

    def draw(self, epoch: int) -> Int64Array:
        """Return the numbers of an epoch's samples, (``epoch_size``,), one from each canonical node in turn."""
        view = self._view_of(epoch)
        sizes, rng = self.shard_sizes, np.random.default_rng(self.seed + view)
        # Without shuffle, all epochs leave the same samples out.
        counts = get_sampling(sizes, self.epoch_size, 1, self.seed, view, self.shuffle)
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

    def _view_of(self, epoch: int) -> int:
        return epoch if self.views is None else epoch % self.views

    def _by_length(self, order: Int64Array, lengths: Int64Array, epoch: int) -> Int64Array:
        """Sort each canonical node's samples, (nodes, samples), by length within windows."""
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
    def _with_shards_ahead(view: int, ids: list[int], shards: list[int]) -> Iterator[Sample]:
        begin = 0
        for i, sample_id in enumerate(ids):
            end = i + 1 + min(AHEAD, OPENING * (i + 1))
            yield Sample(view, sample_id, tuple(dict.fromkeys(shards[begin:end])))
            begin = end


def padded_sizes(lengths: Int64Array) -> list[int]:
    """Return at most 16 lengths to which batches are padded, ascending, given the lengths of all samples, (N,).

    A compiled model needs a graph for each length. Lengths are closest together where most of the sound is; the last
    one is the longest sample's.
    """
    ascending = np.sort(lengths)
    # Sizes are equally far apart on this scale: the share of all sound that is in shorter clips, and, with half its
    # weight, the length, so that few long clips get sizes, too.
    scale = ascending.cumsum() / ascending.sum() + ascending / (2 * ascending[-1])
    chosen = np.searchsorted(scale, np.linspace(scale[0], scale[-1], 17)[1:-1])
    return np.unique(np.append(ascending[chosen], ascending[-1])).tolist()


def collate_clips(samples: Sequence[dict[str, Any]], name: str, sizes: Sequence[int]) -> dict[str, Tensor]:
    """Return a batch of clips: ``name``, (B, L) float32; ``sample_id``, (B,); and, if some are padded, ``lengths``."""
    inputs, *lengths = collate([sample[name] for sample in samples], sizes)
    sample_ids = torch.tensor([sample["sample_id"] for sample in samples])
    return {name: inputs, "sample_id": sample_ids} | ({"lengths": lengths[0]} if lengths else {})


class OrderedSamples(Dataset[Any]):
    """Samples whose epochs a DataLoader reads with ``sampler=dataset.order``, also after a resume."""

    order: EpochOrder

    def state_dict(self, num_samples: int, from_beginning: bool) -> Record:
        """Return the state after this many samples of the epoch, which Composer counts over all ranks and saves."""
        assert from_beginning
        return {"epoch": self.order.current_epoch, "sample_in_epoch": num_samples}

    def load_state_dict(self, state: Record) -> None:
        """Resume an epoch; Composer calls this."""
        self.order.resume(**state)


class StreamingSamples(OrderedSamples):
    """Augmented samples from a column of an MDS data set; ``DataLoader(dataset, sampler=dataset.order)`` reads epochs.

    An epoch has every sample exactly once, or fails with an error that names the shard. A sample is ``{"image": (3, S,
    S) uint8, "sample_id": int, "view": int}``, or has ``"audio": (L,) float32`` instead; if the index has labels, it is
    (image, label), as Composer's algorithms need. The augmentation of a sample depends on (seed, view, sample id)
    alone; the order, on its arguments and the epoch. So samples and order are the same for any number of ranks and
    workers, and after any resume.

    Args:
        index: The data set, and its columns to read: samples and, if it has one, labels.
        transform: The augmentation.
        seed: The seed of the order and of the augmentation.
        num_classes: Number of classes: labels must be from 0 to ``num_classes - 1``.
        cache_limit: Maximum size of the cache of a remote data set, in bytes; default: no limit.
        timeout: How long an unreachable store is retried, in seconds.
        **order: The other arguments of :class:`EpochOrder`.

    Attributes:
        order: The sampler.

    Raises:
        InputError: ``cache_limit`` is too small, or set for a local data set.
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
        """Return one augmented sample.

        Raises:
            ShardError: The sample's shard cannot be fetched, or is corrupt.
            InputError: The sample cannot be decoded, or its label is not the number of a class.
        """
        view, sample_id, ahead = sample
        index, source = self.index, f"sample {sample_id} of {self.index.folder}"
        self.shards.fetch_ahead(ahead)
        stored = self.shards[sample_id]
        values = self.transform(stored[index.column], sample_rng(self.seed, view, sample_id), source)
        if index.labels is None:
            return {index.modality.name: values, "sample_id": sample_id, "view": view}
        label = whole_label(stored[index.labels], source)
        if not 0 <= label < self.num_classes:
            raise InputError(f"{source}: its label must be a number from 0 to {self.num_classes - 1}, got {label}")
        return values, label
