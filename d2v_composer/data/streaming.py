"""Stream training samples from MDS shards: their order, and the augmented samples."""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from composer.utils import dist
from numpy.typing import NDArray
from streaming.base.partition import get_partitions
from streaming.base.sampling import get_sampling
from streaming.base.shuffle import get_shuffle
from streaming.base.world import World
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler
from typing_extensions import override

from d2v_composer.data.mds import Index
from d2v_composer.data.modality import Transform, collate, sample_rng
from d2v_composer.data.shards import Shards
from d2v_composer.data.source import whole_label
from d2v_composer.system.errors import InputError

# Samples of a rank by which shards are fetched before they are needed.
AHEAD = 8192
# The window opens over the first AHEAD / OPENING samples: each worker has a part of the first shards to fetch.
OPENING = 32

log = logging.getLogger(__name__)


class Sample(NamedTuple):
    """A request for one sample, from the main process to a worker."""

    epoch: int
    sample_id: int
    ahead: tuple[int, ...]
    """Shards that will be needed soon."""


class EpochOrder(DistributedSampler[Sample]):
    """This rank's samples, in order; each iteration is the next epoch.

    The order, the shares of nodes and ranks, and the resumption are Streaming's. It runs in the main process, so that
    workers have no state: any number of them, also one that changes, reads the same batches.

    Args:
        shard_sizes: (S,) the samples in each shard.
        batch_size: The batch size of one device.
        shuffle: Shuffle the samples, differently in each epoch.
        seed: The seed of the order.
        shuffle_block_size: The number of samples that are mixed with each other. The shards of as many samples are in
            use at a time.
        num_canonical_nodes: The number of equal parts into which the order is cut. The number of nodes must divide it,
            or be a multiple of it. If it does not divide the epoch, the epoch repeats a few samples.
        epoch_size: The samples of an epoch, drawn again for each; default: all.

    Attributes:
        blocks_at_a_time: The share of ``shuffle_block_size`` whose shards are in use at a time.

    Raises:
        ValueError: ``epoch_size`` is too large.
    """

    blocks_at_a_time = 1.25

    def __init__(
        self,
        shard_sizes: NDArray[np.int64],
        *,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        shuffle_block_size: int = 1 << 16,
        num_canonical_nodes: int = 1,
        epoch_size: int | None = None,
    ) -> None:
        # Composer accepts no other class of samplers on several ranks; of its methods, none is left.
        num_samples = int(shard_sizes.sum())
        super().__init__(range(num_samples), num_replicas=1, rank=0)  # pyright: ignore[reportArgumentType]
        if epoch_size is not None and epoch_size > num_samples:  # Streaming would repeat samples
            raise ValueError(f"epoch_size must be at most {num_samples}, the number of samples; got {epoch_size}")
        self.shard_sizes, self.epoch_size, self.batch_size = shard_sizes, epoch_size or num_samples, batch_size
        self.shuffle, self.seed, self.shuffle_block_size = shuffle, seed, shuffle_block_size
        self.num_canonical_nodes = num_canonical_nodes
        self.initial_physical_nodes: int | None = None
        self._epoch, self._first_sample = 0, 0
        self._is_begun = False

    @override
    def __len__(self) -> int:
        """Return this rank's number of samples in a whole epoch."""
        return math.ceil(self.epoch_size / World.detect().num_ranks)

    @override
    def __iter__(self) -> Iterator[Sample]:
        """Return the samples of the next epoch, or the rest of a resumed epoch."""
        if self._is_begun:
            self._epoch, self._first_sample = self._epoch + 1, 0
        self._is_begun = True
        world = World.detect()
        work = self.arrange(self._epoch, self._first_sample, world)[world.node, world.rank_of_node]
        ids = work[work != -1]  # padding of unequal parts
        shards = np.searchsorted(self.shard_sizes.cumsum(), ids, side="right")
        return self._with_shards_ahead(self._epoch, ids.tolist(), shards.tolist())

    def arrange(self, epoch: int, first_sample: int, world: World) -> NDArray[np.int64]:
        """Return the samples of an epoch, (nodes, ranks per node, workers per rank, batches, batch); -1: none."""
        return self._divide(self.draw(epoch), first_sample, world, self.batch_size, self.initial_physical_nodes)

    def draw(self, epoch: int) -> NDArray[np.int64]:
        """Return the samples of an epoch in Streaming's order, (``epoch_size``,)."""
        sizes, rng = self.shard_sizes, np.random.default_rng(self.seed + epoch)
        # Without shuffle, all epochs leave the same samples out.
        counts = get_sampling(sizes, self.epoch_size, 1, self.seed, epoch, self.shuffle)
        drawn = [
            begin + (np.arange(size) if count == size else np.sort(rng.choice(size, count, replace=False)))
            for begin, size, count in zip(sizes.cumsum() - sizes, sizes, counts, strict=True)
            if count
        ]
        ids = np.concatenate(drawn)
        if not self.shuffle:
            return ids
        options = self.num_canonical_nodes, self.seed, epoch, self.shuffle_block_size
        return ids[get_shuffle("py1e", counts[counts > 0], *options)]

    def _divide(
        self, ids: NDArray[np.int64], first_sample: int, world: World, batch_size: int, initial_nodes: int | None
    ) -> NDArray[np.int64]:
        shape = world.num_nodes, world.ranks_per_node, world.workers_per_rank, batch_size
        places = get_partitions("relaxed", len(ids), self.num_canonical_nodes, *shape, first_sample, initial_nodes)
        return np.where(places == -1, -1, ids[places])

    def state_dict(self, num_samples: int) -> dict[str, Any]:
        """Return Streaming's state, after this many samples of the epoch, counted over all ranks."""
        return {
            "epoch": self._epoch,
            "sample_in_epoch": num_samples,
            "num_canonical_nodes": self.num_canonical_nodes,
            "shuffle_seed": self.seed,
            "initial_physical_nodes": self.initial_physical_nodes or World.detect().num_nodes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume an epoch."""
        self._epoch, self._first_sample, self._is_begun = state["epoch"], state["sample_in_epoch"], False
        self.num_canonical_nodes, self.seed = state["num_canonical_nodes"], state["shuffle_seed"]
        self.initial_physical_nodes = state["initial_physical_nodes"]

    @staticmethod
    def _with_shards_ahead(epoch: int, ids: list[int], shards: list[int]) -> Iterator[Sample]:
        begin = 0
        for i, sample_id in enumerate(ids):
            end = i + 1 + min(AHEAD, OPENING * (i + 1))
            yield Sample(epoch, sample_id, tuple(dict.fromkeys(shards[begin:end])))
            begin = end


class LengthOrder(EpochOrder):
    """An order that puts samples of similar length into a batch; else as :class:`EpochOrder`.

    Each canonical node's order is cut into windows of about ``shuffle_block_size`` samples of all nodes. Within a
    window, a node's samples are sorted by length and cut into its parts of the global batches. The parts of equal
    place make a batch, and the window's batches are shuffled. Without ``shuffle``, the order is not by length.

    Args:
        shard_sizes: (S,) the samples in each shard.
        lengths: (N,) the length of each sample in a batch.
        **options: As for :class:`EpochOrder`; ``epoch_size`` must be whole batches of all ranks, and
            ``num_canonical_nodes`` divide such a batch.
    """

    blocks_at_a_time = 2.25  # a window, and half a block on either side, over which Streaming spreads a shard

    def __init__(self, shard_sizes: NDArray[np.int64], *, lengths: NDArray[np.int64], **options: Any) -> None:
        super().__init__(shard_sizes, **options)
        self.lengths = lengths

    @override
    def arrange(self, epoch: int, first_sample: int, world: World) -> NDArray[np.int64]:
        if not self.shuffle:
            return super().arrange(epoch, first_sample, world)
        nodes, batch_size = self.num_canonical_nodes, self.batch_size * world.num_ranks
        # Streaming's order for as many nodes, of one rank each: the same for any real number.
        node_batch = batch_size // nodes
        order = self._divide(self.draw(epoch), 0, World(nodes, 1, 1, 0), node_batch, None).reshape(nodes, -1)
        window_size = max(1, self.shuffle_block_size // batch_size) * node_batch
        batches = []
        for begin in range(0, order.shape[1], window_size):
            window = order[:, begin : begin + window_size]
            rng = np.random.default_rng((self.seed, epoch, begin))
            by_length = np.lexsort((rng.random(window.shape), self.lengths[window]))
            window = np.take_along_axis(window, by_length, axis=1).reshape(nodes, -1, node_batch)
            batches.append(rng.permutation(window, axis=1))
        left = np.concatenate(batches, axis=1)[:, first_sample // batch_size :].transpose(1, 0, 2)
        work = left.reshape(-1, 1, world.num_nodes, world.ranks_per_node, self.batch_size)
        return work.transpose(2, 3, 1, 0, 4)


def padded_sizes(lengths: NDArray[np.int64]) -> list[int]:
    """Return at most 16 lengths that batches are padded to, ascending, up to the longest sample's, from (N,).

    A compiled model needs a graph for each. They are close where most of the sound is, and nowhere far apart.
    """
    ascending = np.sort(lengths)
    place = ascending.cumsum() / ascending.sum() + ascending / (2 * ascending[-1])
    chosen = np.searchsorted(place, np.linspace(place[0], place[-1], 17)[1:-1])
    return np.unique(np.append(ascending[chosen], ascending[-1])).tolist()


def collate_clips(samples: Sequence[dict[str, Any]], name: str, sizes: Sequence[int]) -> dict[str, Tensor]:
    """Return a batch of :class:`StreamingSamples` called ``name``, with ``lengths`` if some are padded."""
    inputs, *lengths = collate([sample[name] for sample in samples], sizes)
    sample_ids = torch.tensor([sample["sample_id"] for sample in samples])
    return {name: inputs, "sample_id": sample_ids} | ({"lengths": lengths[0]} if lengths else {})


class StreamingSamples(Dataset[Any]):
    """Augmented samples from a column of an MDS data set; ``DataLoader(dataset, sampler=dataset.order)`` reads epochs.

    An epoch has every sample exactly once, or fails with an error that names the shard. A sample is ``{"image": (3, S,
    S) uint8, "sample_id": int}``, or ``"audio": (L,) float32``; if labels are asked for, (image, label), as Composer's
    algorithms need. Its augmentation depends on (seed, epoch, sample id) alone, and the order on the seed, the epoch
    and ``num_canonical_nodes``: both are the same for any number of ranks and workers, and after any resume.

    Args:
        index: The data set, and the columns to read: samples, and labels if they are asked for.
        transform: The augmentation.
        seed: The seed of the order and of the augmentation.
        num_classes: The labels are numbers from 0 to ``num_classes - 1``.
        cache_limit: Maximum size of the cache of a remote data set, in bytes; default: no limit.
        timeout: How long an unreachable store is retried, in seconds.
        **order: The other arguments of :class:`EpochOrder`, or with ``lengths`` of :class:`LengthOrder`.

    Attributes:
        order: The sampler.

    Raises:
        InputError: ``cache_limit`` is too small, or set for a local data set.
        ValueError: ``epoch_size`` is too large.
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
        shard_sizes = np.array([shard.samples for shard in index.shards])
        self.order = (LengthOrder if "lengths" in order else EpochOrder)(shard_sizes, seed=seed, **order)
        self._warn_of_small_limit()

    def __len__(self) -> int:
        return len(self.index)

    @override
    def __getitem__(self, sample: Sample | int) -> Any:
        """Return one augmented sample; a bare sample number means the first epoch.

        Raises:
            ShardError: Its shard cannot be fetched, or is corrupt.
            InputError: It is not an image that can be read, or its label is not that of a class.
        """
        epoch, sample_id, ahead = sample if isinstance(sample, Sample) else Sample(0, sample, ())
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

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Return the state after this many samples of the epoch, which Composer counts and saves."""
        assert from_beginning
        return self.order.state_dict(num_samples)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume an epoch; Composer calls this."""
        self.order.load_state_dict(state)

    def _warn_of_small_limit(self) -> None:
        """Warn if the shards that are shuffled together exceed the cache limit."""
        # Each canonical node mixes its own part of the order.
        order = self.order
        mixed_at_a_time = order.blocks_at_a_time * order.shuffle_block_size * order.num_canonical_nodes
        samples = min(round(mixed_at_a_time / World.detect().num_nodes), len(self))
        needed = sum(shard.raw.bytes for shard in self.index.shards) * samples // len(self)
        if self.order.shuffle and 0 < self.shards.limit < needed and dist.get_local_rank() == 0:
            log.warning(
                "%s: cache_limit %d is less than the size of the shards that are shuffled together, about %d bytes: "
                "shards will be fetched more than once per epoch; a smaller shuffle_block_size helps",
                self.shards.local,
                self.shards.limit,
                needed,
            )
