"""A StreamingDataset of which each epoch has every sample exactly once, or ends with an error."""

import logging
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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

from d2v_composer.data.cache_folder import CacheFolder
from d2v_composer.data.lookahead import Lookahead
from d2v_composer.data.sample_order import draw_samples
from d2v_composer.data.shard_cache import Claim, ShardCache
from d2v_composer.data.shard_states import ShardStates
from d2v_composer.data.shared_memory import check_shared_memory, reserve_for_run, shared_memory_needed
from d2v_composer.data.verified_stream import VerifiedStream
from d2v_composer.system.compat import recorded_shared_memory, remove_shared_memory, shared_memory_name
from d2v_composer.system.errors import InputError, ShardError
from d2v_composer.system.multi_node import raise_on_all_ranks
from d2v_composer.system.retry import reason
from d2v_composer.system.worker_lifetime import end_with_parent

__all__ = ["VerifiedDataset"]

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
