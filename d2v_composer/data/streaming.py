"""Stream training samples from MDS shards: their order, and the augmented samples."""

import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from composer.utils import dist
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.batching import generate_work
from streaming.base.world import World
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler
from typing_extensions import override

from d2v_composer.data.labeled import whole_label
from d2v_composer.data.modality import Transform, collate, sample_rng
from d2v_composer.data.shards import Shards
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
    # What generate_work reads of a StreamingDataset, besides what __init__ sets: an epoch's samples are drawn from one
    # stream. Streaming's defaults depend on the number of nodes: a resume on another number must have the same order.
    resample_streams = StreamingDataset.resample_streams
    shuffle_algo, partition_algo, sampling_method, sampling_granularity = "py1e", "relaxed", "balanced", 1
    num_streams, shard_offset_per_stream = 1, np.array([0])
    initial_physical_nodes: int | None = None

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
        self.epoch_size = epoch_size or num_samples
        self.batch_size = batch_size
        self.shuffle = self.epoch_seed_change = shuffle
        self.shuffle_seed, self.shuffle_block_size = seed, shuffle_block_size
        self.num_canonical_nodes = num_canonical_nodes
        self.streams, self.shards_per_stream = [SimpleNamespace(choose=self.epoch_size)], [len(shard_sizes)]
        self.samples_per_shard = shard_sizes
        self.sample_offset_per_shard = shard_sizes.cumsum() - shard_sizes

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
        shards = np.searchsorted(self.samples_per_shard.cumsum(), ids, side="right")
        return self._with_shards_ahead(self._epoch, ids.tolist(), shards.tolist())

    def arrange(self, epoch: int, first_sample: int, world: World) -> NDArray[np.int64]:
        """Return the samples of an epoch, (nodes, ranks per node, workers per rank, batches, batch); -1: none."""
        return generate_work("random", self, world, epoch, first_sample)  # pyright: ignore[reportArgumentType]

    def state_dict(self, num_samples: int) -> dict[str, Any]:
        """Return Streaming's state, after this many samples of the epoch, counted over all ranks."""
        return {
            "epoch": self._epoch,
            "sample_in_epoch": num_samples,
            "num_canonical_nodes": self.num_canonical_nodes,
            "shuffle_seed": self.shuffle_seed,
            "initial_physical_nodes": self.initial_physical_nodes or World.detect().num_nodes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume an epoch."""
        self._epoch, self._first_sample, self._is_begun = state["epoch"], state["sample_in_epoch"], False
        self.num_canonical_nodes, self.shuffle_seed = state["num_canonical_nodes"], state["shuffle_seed"]
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
        canonical = copy(self)
        canonical.batch_size, canonical.initial_physical_nodes = batch_size // nodes, None
        order = EpochOrder.arrange(canonical, epoch, 0, World(nodes, 1, 1, 0)).reshape(nodes, -1)
        window_size = max(1, self.shuffle_block_size // batch_size) * canonical.batch_size
        batches = []
        for begin in range(0, order.shape[1], window_size):
            window = order[:, begin : begin + window_size]
            rng = np.random.default_rng((self.shuffle_seed, epoch, begin))
            by_length = np.lexsort((rng.random(window.shape), self.lengths[window]))
            window = np.take_along_axis(window, by_length, axis=1).reshape(nodes, -1, canonical.batch_size)
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


class LabelColumn(NamedTuple):
    """A column of labels: numbers from 0 to ``num_classes - 1``."""

    name: str
    num_classes: int


class StreamingSamples(Dataset[Any]):
    """Augmented samples from a column of an MDS data set; ``DataLoader(dataset, sampler=dataset.order)`` reads epochs.

    An epoch has every sample exactly once, or fails with an error that names the shard. A sample is ``{"image": (3, S,
    S) uint8, "sample_id": int}``, or ``"audio": (L,) float32``; if labels are asked for, (image, label), as Composer's
    algorithms need. Its augmentation depends on (seed, epoch, sample id) alone, and the order on the seed, the epoch
    and ``num_canonical_nodes``: both are the same for any number of ranks and workers, and after any resume.

    Args:
        local: The data set, or the cache of a remote one.
        remote: The address in an object store, or ``None``.
        transform: The augmentation.
        column: The column of the samples: files (encoded as ``bytes``, ``jpeg`` or ``png``), or pixels (``pil``).
        name: Name of the samples' entry in a batch.
        seed: The seed of the order and of the augmentation.
        labels: Their column; default: none.
        cache_limit: Maximum size of the cache of a remote data set, in bytes; default: no limit.
        timeout: How long an unreachable store is retried, in seconds.
        **order: The other arguments of :class:`EpochOrder`, or with ``lengths`` of :class:`LengthOrder`.

    Attributes:
        order: The sampler.

    Raises:
        InputError: The index cannot be read, or ``cache_limit`` is too small, or set for a local data set.
        ValueError: ``epoch_size`` is too large.
    """

    def __init__(
        self,
        *,
        local: str | Path,
        remote: str | None = None,
        transform: Transform,
        column: str = "image",
        name: str = "image",
        seed: int,
        labels: LabelColumn | None = None,
        cache_limit: int | None = None,
        timeout: float = 600.0,
        **order: Any,
    ) -> None:
        columns = [column] if labels is None else [column, labels.name]
        self.shards = Shards(local=local, remote=remote, columns=columns, cache_limit=cache_limit, timeout=timeout)
        shard_sizes = np.array([shard.samples for shard in self.shards.shards])
        self.order = (LengthOrder if "lengths" in order else EpochOrder)(shard_sizes, seed=seed, **order)
        self.column, self.name = column, name
        self.transform = transform
        self.seed = seed
        self.labels = labels
        self._warn_of_small_limit()

    def __len__(self) -> int:
        return len(self.shards)

    @override
    def __getitem__(self, sample: Sample | int) -> Any:
        """Return one augmented sample; a bare sample number means the first epoch.

        Raises:
            ShardError: Its shard cannot be fetched, or is corrupt.
            InputError: It is not an image that can be read, or its label is not that of a class.
        """
        epoch, sample_id, ahead = sample if isinstance(sample, Sample) else Sample(0, sample, ())
        source = f"sample {sample_id} of {self.shards.local}"
        self.shards.fetch_ahead(ahead)
        stored = self.shards[sample_id]
        pixels = self.transform(stored[self.column], sample_rng(self.seed, epoch, sample_id), source)
        if self.labels is None:
            return {self.name: pixels, "sample_id": sample_id}
        label = whole_label(stored[self.labels.name], source)
        if not 0 <= label <= (largest := self.labels.num_classes - 1):
            raise InputError(f"{source}: its label must be a number from 0 to {largest}, got {label}")
        return pixels, label

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
        needed = sum(shard.raw.bytes for shard in self.shards.shards) * samples // len(self)
        if self.order.shuffle and 0 < self.shards.limit < needed and dist.get_local_rank() == 0:
            log.warning(
                "%s: cache_limit %d is less than the size of the shards that are shuffled together, about %d bytes: "
                "shards will be fetched more than once per epoch; a smaller shuffle_block_size helps",
                self.shards.local,
                self.shards.limit,
                needed,
            )


# Shared memory, on Linux. The queues and events of one worker are semaphores, of a page each.
SHARED_MEMORY, SEMAPHORES, PAGE = Path("/dev/shm"), 16, 4096


def shared_memory_needed(ranks: int, workers: int, prefetch_factor: int, batch_bytes: int) -> int:
    """Return the bytes of shared memory that training data needs on a machine; ``workers`` and batch are per rank."""
    # Beside those made in advance, each rank has one in the making and one in use.
    batches = (workers * prefetch_factor + 2) * (batch_bytes + PAGE) if workers else 0
    return ranks * (batches + workers * SEMAPHORES * PAGE)


def check_shared_memory(needed: int) -> str | None:
    """Return an error message if fewer than ``needed`` bytes are free.

    SIGBUS would silently kill a process that writes more than is free.
    """
    if not SHARED_MEMORY.is_dir() or (usage := shutil.disk_usage(SHARED_MEMORY)).free >= needed:
        return None
    size = f"{math.ceil((usage.used + needed) / 2**20)}m"
    return (
        f"{SHARED_MEMORY}: {usage.free:,} of {usage.total:,} bytes are free, but training data needs {needed:,}; "
        f"enlarge it (docker run --shm-size={size}, or mount -o remount,size={size} {SHARED_MEMORY}), or lower "
        "train_loader.num_workers or prefetch_factor"
    )
