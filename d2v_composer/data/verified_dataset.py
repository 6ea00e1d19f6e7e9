"""A StreamingDataset that cannot lose a sample, or hang, without a word."""

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
from streaming.base.shared import SharedArray, SharedScalar, prefix
from streaming.base.util import bytes_to_int
from streaming.base.world import World
from typing_extensions import override

from d2v_composer.data.cache_folder import occupy
from d2v_composer.data.lookahead import Lookahead
from d2v_composer.data.sample_order import draw_samples
from d2v_composer.data.shard_cache import ShardCache
from d2v_composer.data.shared_memory import (
    check_shared_memory,
    closed_afterwards,
    opened_shared_memory,
    reserve_for_run,
    shared_memory_needed,
)
from d2v_composer.data.verified_stream import ShardError, VerifiedStream
from d2v_composer.system.errors import InputError
from d2v_composer.system.multi_node import raise_on_all_ranks
from d2v_composer.system.retry import reason
from d2v_composer.system.worker_lifetime import end_with_parent

__all__ = ["VerifiedDataset"]

# A shard may be evicted between being fetched and being read.
READ_ATTEMPTS = 8

# Arguments of StreamingDataset that would be ignored, or misread, with the reason or what to give instead.
UNSUPPORTED = {
    "streams": "give one data set, by local and remote",
    "split": "give the split's own folder as local, and as remote",
    "validate_hash": "every shard is compared with the hashes that its index has",
    "download_retry": "timeout says for how long a download is tried again",
    "download_timeout": "timeout says for how long a download is tried again",
    "keep_zip": "a compressed shard goes when it is unpacked",
    "sampling_method": "an epoch draws other samples each time",
    "sampling_granularity": "samples are drawn one by one",
    "batching_method": "there is but one data set to draw from",
    "replication": "each device reads its own samples",
    "allow_unsafe_types": "pickles are never read",
    "stream_name": "the stream is one that verifies",
    "stream_config": "the stream is one that verifies",
}

log = logging.getLogger(__name__)


class VerifiedDataset(StreamingDataset):
    """An MDS data set of which an epoch has every sample once, or raises.

    Streaming's own order, resumption and bookkeeping are used; fetching is not, since there a shard that cannot be had
    ends the epoch early, or hangs, and a damaged one stays in the cache. Here each shard is verified before its first
    use in a run (see :class:`ShardCache`), once a machine; the first thread that gives a shard up leaves word, so that
    the others try but once more; and a shard whose fetching thread is gone is taken over.

    Args:
        local: The data set, or where the shards of a remote one are kept: for one run at a time, and in it for the
            data set made last.
        remote: Its address in an object store, or ``None``.
        timeout: How long an unreachable store is tried again, in seconds.
        cache_limit: What ``local`` may hold of a remote data set, in bytes or as '100gb'; default all.
        shuffle_block_size: How many samples are mixed with each other. The shards of as many are in use at a time.
        **kwargs: As :class:`streaming.StreamingDataset`'s, but for those in ``UNSUPPORTED``; ``epoch_size`` is at most
            the number of samples.

    Attributes:
        epoch: Which one is being read.

    Raises:
        InputError: Another run uses ``local`` for a remote data set, or an argument is not supported.
        ValueError: ``cache_limit`` is too small, or there is one for what is not a cache.
    """

    def __init__(
        self,
        *,
        local: str | Path,
        remote: str | None,
        timeout: float,
        cache_limit: int | str | None,
        shuffle_block_size: int,
        **kwargs: Any,
    ) -> None:
        for name in UNSUPPORTED.keys() & kwargs.keys():
            raise InputError(f"{name}: is not supported: {UNSUPPORTED[name]}")
        # Whatever is evicted from there would be lost.
        if remote is not None and Path(remote).resolve() == Path(local).resolve():
            raise ValueError(f"remote must be elsewhere than local {local}")
        if cache_limit and remote is None:
            raise ValueError("cache_limit is for a remote data set; give none for a local one")
        self.folder = str(local)
        self.epoch = 0
        self._names = reserve_for_run()
        leave = weakref.finalize(self, self._names.release)
        self.stream = VerifiedStream(local=local, remote=remote, timeout=timeout)
        try:
            self._occupy(local, remote)
            with self._names.given_to_streaming(self._check_shared_memory):
                super().__init__(
                    streams=[self.stream], cache_limit=cache_limit, shuffle_block_size=shuffle_block_size, **kwargs
                )
                if self.epoch_size > self.num_samples:
                    raise ValueError(
                        f"epoch_size must be at most the {self.num_samples} samples, got {self.epoch_size}"
                    )
                self.cache = self._shard_cache(None if cache_limit is None else bytes_to_int(cache_limit))
            if dist.get_local_rank() == 0:
                if cache_limit:
                    self._check_limit(bytes_to_int(cache_limit), shuffle_block_size)
                if self._cache_folder is not None:
                    self._cache_folder.give_to(self.cache)
                self.cache.forget_unverified()
        except BaseException:
            self._cache_folder = None  # a traceback may keep this object
            leave()
            raise

    def _occupy(self, local: str | Path, remote: str | None) -> None:
        self._cache_folder, fault = None, None
        if remote is not None and dist.get_local_rank() == 0:
            try:
                self._cache_folder = occupy(Path(local))
            except InputError as error:
                fault = str(error)
        raise_on_all_ranks(fault)

    def _check_shared_memory(self) -> None:
        raise_on_all_ranks(check_shared_memory(shared_memory_needed(self.num_shards, self.epoch_size)))

    def _shard_cache(self, limit: int | None) -> ShardCache:
        number = self._shm_prefix_int
        return ShardCache(
            self.stream,
            self.shards,
            states=self._shard_states,
            access_times=self._shard_access_times,
            fetchers=SharedArray(2 * self.num_shards, np.int64, prefix._get_path(number, "fetchers")),
            is_replaced=SharedScalar(np.uint8, prefix._get_path(number, "is_replaced")),
            usage=self._cache_usage,
            index_bytes=self.stream.get_index_size(),  # now: the folder may be removed under a run
            limit=limit,
            lock_path=self._cache_filelock_path,
        )

    def __getstate__(self) -> dict[str, Any]:
        # For a worker that is not forked: it reads, and does not hold.
        return {name: value for name, value in self.__dict__.items() if name not in ("_cache_folder", "_names")}

    @override
    def load_state_dict(self, obj: dict[str, Any]) -> None:
        with opened_shared_memory(streaming_dataset, self._names.memory):
            super().load_state_dict(obj)

    @override
    def resample_streams(self, epoch: int, stream_id: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        seed = self.shuffle_seed + epoch
        pick_seed = seed if self.epoch_seed_change else self.shuffle_seed
        return draw_samples(self.samples_per_shard, self.epoch_size, pick_seed, seed)

    @override
    def _resume(self, world: World, epoch: int) -> tuple[int, int]:
        # Of each epoch and each checkpoint the base class leaves a descriptor open, until there are no more.
        with closed_afterwards(streaming_dataset):
            return super()._resume(world, epoch)

    def _check_limit(self, limit: int, shuffle_block_size: int) -> None:
        smallest = self.cache.index_bytes + 4 * max(shard.get_max_size() for shard in self.shards)
        if limit < smallest:
            raise ValueError(f"cache_limit must be at least {smallest} bytes, the index and four shards, got {limit}")
        # Each canonical node mixes its own part of the order.
        mixed_at_a_time = 1.25 * shuffle_block_size * (self.num_canonical_nodes or 1)
        samples = min(round(mixed_at_a_time / self._unique_rank_world.num_nodes), self.num_samples)
        needed = sum(shard.get_raw_size() for shard in self.shards) * samples // self.num_samples
        if self.shuffle and limit < needed:
            log.warning(
                "%s: cache_limit %d is less than what is mixed at a time, about %d bytes: shards will be fetched more "
                "than once an epoch; a smaller shuffle_block_size helps",
                self.folder,
                limit,
                needed,
            )

    @override
    def __iter__(self) -> Iterator[dict[str, Any]]:
        """This worker's samples of the next epoch, or of the rest of one that is resumed.

        Raises:
            ShardError: A shard cannot be had.
        """
        end_with_parent()
        self._unique_worker_world = self._unique_rank_world.detect_workers()
        self._parallel_worker_world = self._parallel_rank_world.detect_workers()
        # Not the one with which the process that forked this worker has read.
        self._shared_barrier.lock = FileLock(self._shared_barrier.filelock_path)
        self.epoch, sample_in_epoch = self._resume_incr_epoch()
        sample_ids = self._get_work(self.epoch, sample_in_epoch)
        sample_ids = sample_ids[sample_ids != -1]  # padding, where the parts are not equal

        assert self.predownload is not None  # the base class sets one
        ahead = Lookahead(self.cache, self._shard_of, sample_ids, self.predownload)
        interpreter_ends = sys.is_finalizing  # when it does, there may be no more globals
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
        """One sample as it is stored.

        Raises:
            ShardError: Its shard cannot be had.
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
            except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # where the index has no hash
                raise ShardError(
                    f"{self.folder}: shard {shard_id} is damaged: its sample {sample_in_shard} cannot be read "
                    f"({reason(error)})"
                ) from error
            self.cache.touch(shard_id)
            return sample
        raise ShardError(
            f"{self.folder}: shard {shard_id} was evicted {retry} times before sample {sample_id} could be read: "
            f"cache_limit {self.cache_limit} is too small"
        )

    @override
    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetch and verify a shard, unless another thread of this machine does.

        Args:
            shard_id: Which.
            blocking: Whether to wait for that thread, and for room in the cache.

        Raises:
            ShardError: It cannot be had.
        """
        if blocking:
            self.cache.prepare(shard_id)
        elif (claim := self.cache.claim(shard_id)).is_ours:
            self.cache.fetch(shard_id, claim)
