"""Training images from MDS shards, local or in an object store."""

import functools
import logging
import math
import os
import secrets
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from composer.utils import dist
from filelock import FileLock
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base import dataset as streaming_dataset
from streaming.base.shared import SharedArray, SharedMemory, SharedScalar
from streaming.base.util import bytes_to_int
from streaming.base.world import World
from typing_extensions import override

from d2v_composer.data.images import RandomResizedCropFlip, sample_rng
from d2v_composer.data.index import keep_encoded
from d2v_composer.data.labeled import whole_label
from d2v_composer.data.shards import CacheFolder, Claim, Lookahead, ShardCache, ShardStates, VerifiedStream
from d2v_composer.system.errors import InputError, ShardError, reason
from d2v_composer.system.files import acquire, is_last_user, machine_folder, share, sole_user
from d2v_composer.system.processes import end_with_parent
from d2v_composer.system.ranks import gather_objects, raise_on_all_ranks
from d2v_composer.system.third_party import (
    named_shared_memory,
    recorded_shared_memory,
    remove_shared_memory,
    shared_memory_name,
)

# MERGED FROM d2v_composer/data/streaming.py: The samples of an epoch and the shards that a node reads, as

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


# MERGED FROM d2v_composer/data/streaming.py: Names in shared memory that belong to one run while it lives, and are

FOLDER = Path("/dev/shm")  # on Linux; elsewhere shared memory is not made of files
IN_USE = "in_use"
# Far above those of other programs, which count from 0. Drawn at random: the resource tracker of a killed process may
# remove its names a moment after its lock is gone.
FIRST_NUMBER, NUM_NUMBERS, ANY_NUMBER = 1_000_000, 9_000_000, "[1-9]" + 6 * "[0-9]"
# Arrays: Streaming's nine, our two, and the locks. Semaphores: the queues and events of one worker.
NUM_ARRAYS, SEMAPHORES = 16, 16
PAGE = os.sysconf("SC_PAGE_SIZE")

log = logging.getLogger(__name__)


class Reservation:
    """A number for names in shared memory, held by a run until the last of its processes on this machine ends.

    Forked processes, such as data workers, count too.

    Args:
        number: The number with which the names begin.
        descriptor: The locked file.

    Attributes:
        memory: The shared memory under the number that this process has opened.
    """

    def __init__(self, number: int, descriptor: int) -> None:
        self.number = number
        self.memory: list[SharedMemory] = []
        self._descriptor = descriptor
        self._pid = os.getpid()

    def given_to_streaming(self, check: Callable[[], None]) -> AbstractContextManager[None]:
        """Make a StreamingDataset that is made within the block use the number.

        Args:
            check: Called once the index is read, before any shared memory is made.
        """
        return named_shared_memory(self.number, _folder(), self.memory, check)

    def release(self) -> None:
        """Remove this process's shared memory and, in the last process of the run, all files under the number."""
        if os.getpid() != self._pid:  # a worker's copy
            return
        try:
            remove_shared_memory(self.memory)
            if is_last_user(self._descriptor):
                _remove_files(self.number)
        finally:  # torch raises from a signal handler if a worker was killed
            os.close(self._descriptor)


def reserve_for_run() -> Reservation:
    """Reserve a number for the ranks of this node, and remove what killed runs left.

    Raises:
        InputError: On all ranks, if the folder of shared memory cannot be written.
    """
    reservation, fault = None, None
    if dist.get_local_rank() == 0:
        _remove_abandoned()
        try:
            reservation = _reserve()
        except OSError as error:
            fault = f"{_folder()}: cannot be written ({error.strerror}); data sets share their state there"
    raise_on_all_ranks(fault)
    numbers = gather_objects(-1 if reservation is None else reservation.number)
    return reservation or _join(numbers[dist.get_global_rank() - dist.get_local_rank()])


def shared_memory_needed(
    num_shards: int,
    num_samples: int,
    ranks: int = 1,
    workers: int = 0,
    prefetch_factor: int = 2,
    batch_bytes: int = 0,
) -> int:
    """Return the bytes of shared memory that training data takes on one machine.

    Args:
        num_shards: The shards of the data set.
        num_samples: The samples of an epoch.
        ranks: The ranks on this machine.
        workers: The workers of each rank, ``train_loader.num_workers``.
        prefetch_factor: The batches that each worker makes in advance.
        batch_bytes: The bytes of one rank's batch: batch size x 3 x height x width for uint8 images.
    """
    # For each shard a state, its last use, and process and thread; the order of an epoch; small arrays of a page.
    arrays = num_shards * (1 + 8 + 16) + num_samples * 8 + NUM_ARRAYS * PAGE
    # Beside those made in advance, each rank has one in the making and one in use.
    batches = ranks * (workers * prefetch_factor + 2) * (batch_bytes + PAGE) if workers else 0
    return arrays + batches + ranks * workers * SEMAPHORES * PAGE


def check_shared_memory(needed: int) -> str | None:
    """Return an error message if fewer bytes of shared memory are free than needed, else ``None``.

    A process that writes more is killed by SIGBUS, without a message.

    Args:
        needed: The bytes; see :func:`shared_memory_needed`.
    """
    if not FOLDER.is_dir():
        return None
    total, used, free = shutil.disk_usage(FOLDER)
    if free >= needed:
        return None
    size = f"{math.ceil((used + needed) / 2**20)}m"
    return (
        f"{FOLDER}: {free:,} of {total:,} bytes are free, training data needs {needed:,}: enlarge it (docker run "
        f"--shm-size={size}, or mount -o remount,size={size} {FOLDER}), or lower train_loader.num_workers or "
        "prefetch_factor"
    )


def _reserve() -> Reservation:
    """Reserve a number that no run on this machine has, of any user, container or temporary folder."""
    while True:
        number = FIRST_NUMBER + secrets.randbelow(NUM_NUMBERS)
        if any(_folder().glob(f"{number}_*")):
            continue
        descriptor = acquire(_file(number, IN_USE))
        if descriptor is None:
            continue
        if share(descriptor):
            return Reservation(number, descriptor)
        os.close(descriptor)


def _join(number: int) -> Reservation:
    """Share the reservation of the node's first rank, which then lasts until this process ends as well."""
    descriptor = acquire(_file(number, IN_USE), shared=True)
    if descriptor is None:
        raise RuntimeError(f"{_file(number, IN_USE)}: reserved for this run, but locked by another")
    return Reservation(number, descriptor)


def _remove_abandoned() -> None:
    """Remove what killed runs of this user left."""
    for lock in FOLDER.glob(f"{ANY_NUMBER}_{IN_USE}"):
        with suppress(OSError), sole_user(lock) as is_abandoned:
            if is_abandoned:
                _remove_files(int(lock.name.split("_")[0]))


def _folder() -> Path:
    """Return the folder for locks: that of the memory, if memory is made of files."""
    if FOLDER.is_dir():
        return FOLDER
    _warn_of_no_folder()
    return machine_folder()


@functools.cache
def _warn_of_no_folder() -> None:
    log.warning("%s: no such folder: all runs on this machine must use the same temporary folder", FOLDER)


def _file(number: int, name: str) -> Path:
    return _folder() / shared_memory_name(number, name)


def _remove_files(number: int) -> None:
    lock = _file(number, IN_USE)
    for path in lock.parent.glob(f"{number}_*"):
        if path != lock:
            path.unlink(missing_ok=True)
    lock.unlink(missing_ok=True)  # last: a file without its lock would never be removed


# MERGED FROM d2v_composer/data/streaming.py: A StreamingDataset of which each epoch has every sample exactly once,

# A shard may be evicted after it was fetched and before it is read.
READ_ATTEMPTS = 8

log = logging.getLogger(__name__)


class VerifiedDataset(StreamingDataset):
    """An MDS data set of which each epoch has every sample exactly once, or ends with an error.

    The order of the samples and the resumption are Streaming's. Fetching is not: where a shard cannot be fetched,
    Streaming ends the epoch early or hangs, and it keeps corrupt shards in the cache. Here :class:`ShardCache` fetches
    and verifies each shard before its first use in a run, once per machine.

    Args:
        local: The data set, or the cache of a remote one. One run at a time can use a cache, and in that run the data
            set made last.
        remote: The address in an object store, or ``None``.
        batch_size: The batch size of one device.
        shuffle: Shuffle the samples, differently in each epoch.
        seed: The seed of the order.
        shuffle_block_size: The number of samples that are mixed with each other. The shards of as many samples are in
            use at a time.
        num_canonical_nodes: The number of equal parts into which the order is cut. The number of nodes must divide it,
            or be a multiple of it. If it does not divide the epoch, the epoch repeats a few samples.
        epoch_size: The samples of an epoch, drawn anew for each; default: all.
        cache_limit: The most that ``local`` may hold of a remote data set, in bytes or as '100gb'; default: all of it.
        timeout: How long an unreachable store is retried, in seconds.
        predownload: The number of samples that each worker looks ahead for shards to fetch.

    Attributes:
        epoch: The epoch that is being read.

    Raises:
        InputError: Another run uses ``local`` as its cache.
        ValueError: ``cache_limit`` is too small, or set for a local data set; or ``epoch_size`` is too large.
    """

    def __init__(
        self,
        *,
        local: str | Path,
        remote: str | None = None,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        shuffle_block_size: int = 1 << 16,
        num_canonical_nodes: int = 1,
        epoch_size: int | None = None,
        cache_limit: int | str | None = None,
        timeout: float = 600.0,
        predownload: int = 1024,
    ) -> None:
        if remote is not None and Path(remote).resolve() == Path(local).resolve():  # evicted shards would be lost
            raise ValueError(f"remote must be another folder than local {local}")
        if cache_limit and remote is None:
            raise ValueError("cache_limit is for a remote data set; omit it for a local one")
        self.folder = str(local)
        self.epoch = 0
        self._names = reserve_for_run()
        give_back = weakref.finalize(self, self._names.release)
        try:
            self._cache_folder = _occupy_on_first_rank(local) if remote is not None else None
            self.stream = VerifiedStream(local=local, remote=remote, timeout=timeout)
            with self._names.given_to_streaming(self._check_before_memory):
                super().__init__(
                    streams=[self.stream],
                    batch_size=batch_size,
                    shuffle=shuffle,
                    shuffle_seed=seed,
                    # Not the default, which depends on the number of nodes: a resume on another number of nodes must
                    # have the same order.
                    shuffle_algo="py1e",
                    shuffle_block_size=shuffle_block_size,
                    num_canonical_nodes=num_canonical_nodes,
                    epoch_size=epoch_size,
                    cache_limit=cache_limit,
                    predownload=max(predownload, batch_size),
                )
                self.cache = self._make_cache()
            if dist.get_local_rank() == 0:
                self._check_limit()
                if self._cache_folder is not None:
                    self._cache_folder.give_to(self.cache)
                self.cache.count()
        except BaseException:
            self._cache_folder = None  # a traceback may keep this object
            give_back()
            raise

    def _check_before_memory(self) -> None:
        if self.epoch_size > self.num_samples:
            raise ValueError(f"epoch_size must be at most the {self.num_samples} samples, got {self.epoch_size}")
        raise_on_all_ranks(check_shared_memory(shared_memory_needed(self.num_shards, self.epoch_size)))

    def _make_cache(self) -> ShardCache:
        fetchers = SharedArray(2 * self.num_shards, np.int64, shared_memory_name(self._names.number, "fetchers"))
        return ShardCache(
            self.stream,
            self.shards,
            states=ShardStates(self._shard_states, self._shard_access_times, fetchers),
            usage=self._cache_usage,
            is_replaced=SharedScalar(np.uint8, shared_memory_name(self._names.number, "is_replaced")),
            limit=None if self.cache_limit is None else bytes_to_int(self.cache_limit),
            lock_path=self._cache_filelock_path,
        )

    def _check_limit(self) -> None:
        limit = self.cache.limit
        if not limit:
            return
        smallest = self.cache.index_bytes + 4 * max(shard.get_max_size() for shard in self.shards)
        if limit < smallest:
            raise ValueError(f"cache_limit must be at least {smallest} bytes, the index and four shards, got {limit}")
        assert self.num_canonical_nodes is not None  # __init__ sets both
        assert self.shuffle_block_size is not None
        # Each canonical node mixes its own part of the order.
        mixed_at_a_time = 1.25 * self.shuffle_block_size * self.num_canonical_nodes
        samples = min(round(mixed_at_a_time / self._unique_rank_world.num_nodes), self.num_samples)
        needed = sum(shard.get_raw_size() for shard in self.shards) * samples // self.num_samples
        if self.shuffle and limit < needed:
            log.warning(
                "%s: cache_limit %d is less than the shards that are mixed at a time, about %d bytes: shards will be "
                "fetched more than once per epoch; a smaller shuffle_block_size helps",
                self.folder,
                limit,
                needed,
            )

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is not forked gets a copy, which reads but does not hold the folder or the names.
        return {name: value for name, value in self.__dict__.items() if name not in ("_cache_folder", "_names")}

    @override
    def load_state_dict(self, obj: dict[str, Any]) -> None:
        with recorded_shared_memory(streaming_dataset, self._names.memory):
            super().load_state_dict(obj)

    @override
    def _resume(self, world: World, epoch: int) -> tuple[int, int]:
        opened: list[SharedMemory] = []
        try:
            with recorded_shared_memory(streaming_dataset, opened):
                return super()._resume(world, epoch)
        finally:
            remove_shared_memory(opened)

    @override
    def resample_streams(self, epoch: int, stream_id: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        seed = self.shuffle_seed + epoch
        pick_seed = seed if self.epoch_seed_change else self.shuffle_seed
        return draw_samples(self.samples_per_shard, self.epoch_size, pick_seed, seed)

    @override
    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Return this worker's samples of the next epoch, or the rest of the epoch that is resumed.

        Raises:
            ShardError: A shard cannot be fetched.
        """
        end_with_parent()
        self._unique_worker_world = self._unique_rank_world.detect_workers()
        self._parallel_worker_world = self._parallel_rank_world.detect_workers()
        # A new lock: the process that forked this worker may have used its own.
        self._shared_barrier.lock = FileLock(self._shared_barrier.filelock_path)
        self.epoch, sample_in_epoch = self._resume_incr_epoch()
        sample_ids = self._get_work(self.epoch, sample_in_epoch)
        sample_ids = sample_ids[sample_ids != -1]  # padding of unequal parts

        assert self.predownload is not None  # __init__ sets it
        ahead = Lookahead(self.cache, self._shard_of, sample_ids, self.predownload)
        interpreter_ends = sys.is_finalizing  # when it does, globals may be gone
        ahead.start()
        try:
            for sample_id in sample_ids:
                yield self[int(sample_id)]
                ahead.num_read += 1
        finally:
            ahead.stop(wait=not interpreter_ends())

    def _shard_of(self, sample_id: int) -> int:
        return self.spanner[sample_id][0]

    @override
    def get_item(self, sample_id: int, retry: int = READ_ATTEMPTS) -> dict[str, Any]:
        """Return one sample as it is stored.

        Raises:
            ShardError: Its shard cannot be fetched, or is corrupt and the index has no hash to tell.
        """
        shard_id, sample_in_shard = self.spanner[sample_id]
        for _ in range(retry):
            if not self.cache.is_here(shard_id):
                self.cache.prepare(shard_id)
            try:
                sample = self.shards[shard_id][sample_in_shard]
            except FileNotFoundError:
                self.cache.note_loss(shard_id)
                continue
            except (ArithmeticError, LookupError, TypeError, ValueError) as error:
                raise ShardError(
                    f"{self.folder}: shard {shard_id} is corrupt: its sample {sample_in_shard} cannot be read "
                    f"({reason(error)})"
                ) from error
            self.cache.states.touch(shard_id)
            return sample
        raise ShardError(
            f"{self.folder}: shard {shard_id} was evicted {retry} times before sample {sample_id} could be read: "
            f"cache_limit {self.cache_limit} is too small"
        )

    @override
    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetch and verify a shard, unless another thread of this machine does.

        Args:
            shard_id: The shard.
            blocking: Wait for that thread, and for room in the cache.

        Raises:
            ShardError: The shard cannot be fetched.
        """
        if blocking:
            self.cache.prepare(shard_id)
        elif self.cache.claim(shard_id) is Claim.FETCH:
            self.cache.fetch(shard_id)


def _occupy_on_first_rank(folder: str | Path) -> CacheFolder | None:
    """Occupy the cache folder on the first rank of the node, and raise an error on all ranks if that fails."""
    occupied, fault = None, None
    if dist.get_local_rank() == 0:
        try:
            occupied = CacheFolder.occupy(Path(folder))
        except InputError as error:
            fault = str(error)
    raise_on_all_ranks(fault)
    return occupied


class LabelColumn(NamedTuple):
    """A column of labels, numbers from 0 to below ``num_classes``."""

    name: str
    num_classes: int


class StreamingImages(VerifiedDataset):
    """Augmented images from a column of an MDS data set.

    A sample is ``{"image": (3, S, S) uint8, "sample_id": int}``, without the other columns; labels, as ``"label"``,
    only if they are asked for. Its augmentation depends on (seed, epoch, sample id) alone, and the order on the seed,
    the epoch and ``num_canonical_nodes``: both are the same for any number of ranks and workers, and after any resume.

    Args:
        transform: The augmentation.
        column: The column of the images: files (encoded as ``bytes``, ``jpeg`` or ``png``), or pixels (``pil``).
        seed: The seed of the order and of the augmentation.
        labels: Their column; default: none.
        **kwargs: The other arguments of :class:`VerifiedDataset`.

    Raises:
        InputError: Another run uses ``local`` as its cache.
        ValueError: ``cache_limit`` is too small, or set for a local data set; or ``epoch_size`` is too large.
    """

    def __init__(
        self,
        *,
        transform: RandomResizedCropFlip,
        column: str = "image",
        seed: int,
        labels: LabelColumn | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(seed=seed, **kwargs)
        keep_encoded(self.shards, column)
        self.column = column
        self.transform = transform
        self.seed = seed
        self.labels = labels

    @override
    def get_item(self, sample_id: int, retry: int = READ_ATTEMPTS) -> dict[str, Any]:
        """Return one augmented sample of the current epoch.

        Raises:
            ShardError: Its shard cannot be fetched.
            InputError: It is not an image that can be read, or its label is not that of a class.
        """
        source = f"sample {sample_id} of {self.folder}"
        stored = super().get_item(sample_id, retry)
        pixels = self.transform(stored[self.column], sample_rng(self.seed, self.epoch, int(sample_id)), source)
        sample = {"image": pixels, "sample_id": int(sample_id)}
        return sample if self.labels is None else {**sample, "label": label_of(stored, self.labels, source)}


def label_of(stored: dict[str, Any], labels: LabelColumn, source: str) -> int:
    """Return a sample's label.

    Raises:
        InputError: It is not that of a class.
    """
    value = stored[labels.name]
    with suppress(TypeError, ValueError):
        if 0 <= (label := whole_label(value)) < labels.num_classes:
            return label
    raise InputError(f"{source}: its label must be a number from 0 to {labels.num_classes - 1}, got {value!r:.40}")
