"""A StreamingDataset that cannot lose a sample, or hang, without a word."""

import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from composer.utils import dist
from filelock import FileLock
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base import dataset as streaming_dataset
from streaming.base.dataset import _ShardState as ShardState
from streaming.base.shared import SharedArray, prefix
from streaming.base.util import bytes_to_int
from streaming.base.world import World
from typing_extensions import override

from d2v_composer.data.shared_memory import closed_afterwards, hold, remove_abandoned, separate_numbers
from d2v_composer.data.verified_stream import ShardError, VerifiedStream
from d2v_composer.errors import InputError
from d2v_composer.locks import acquire, sole_user
from d2v_composer.nodes import find_node_place
from d2v_composer.persistence import reason
from d2v_composer.processes import end_with_parent
from d2v_composer.scratch import machine_lock

__all__ = ["VerifiedDataset"]

TICK = 0.03
# The workers of a run that was just killed see it within a second, and end.
LAST_USER_LEAVES = 15.0
# A shard may be evicted between being fetched and being read.
READ_ATTEMPTS = 8
STARTING_SECONDS = 300.0

log = logging.getLogger(__name__)


class VerifiedDataset(StreamingDataset):
    """An MDS data set of which an epoch has every sample once, or raises.

    Streaming's own order, resumption and bookkeeping are used; fetching is not, since there a shard that cannot be had
    ends the epoch early, or hangs, and a damaged one stays in the cache. Here each shard is verified before its first
    use in a run (see :class:`VerifiedStream`), once a machine; the first process that gives a shard up leaves word, so
    that the others try but once more; and a shard whose fetching process is killed is taken over.

    Args:
        local: The data set, or where the shards of a remote one are kept: for one run at a time.
        remote: Its address in an object store, or ``None``.
        timeout: How long an unreachable store is tried again, in seconds.
        cache_limit: What ``local`` may hold of a remote data set, in bytes or as '100gb'; default all.
        shuffle_block_size: How many samples are mixed with each other. The shards of as many are in use at a time.
        **kwargs: As :class:`streaming.StreamingDataset`'s.

    Attributes:
        epoch: Which one is being read.

    Raises:
        InputError: Another run uses ``local`` for a remote data set.
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
        # Whatever is evicted from there would be lost.
        if remote is not None and Path(remote).resolve() == Path(local).resolve():
            raise ValueError(f"remote must be elsewhere than local {local}")
        if cache_limit and remote is None:
            raise ValueError("cache_limit is for a remote data set; give none for a local one")
        self.folder = str(local)
        self.epoch = 0
        if remote is not None and dist.get_local_rank() == 0:
            self._occupy(Path(local))
        self.stream = VerifiedStream(local=local, remote=remote, timeout=timeout)
        with _starting_alone(), closed_afterwards(prefix) as opened:
            super().__init__(
                streams=[self.stream], cache_limit=cache_limit, shuffle_block_size=shuffle_block_size, **kwargs
            )
            opened.remove(self._locals_shm)  # others are of the runs that have the numbers before
            if (descriptor := hold(self._shm_prefix_int)) is not None:
                weakref.finalize(self, os.close, descriptor)
            # The process that fetches each shard, while it is fetched.
            self._fetchers = SharedArray(self.num_shards, np.int64, prefix._get_path(self._shm_prefix_int, "fetchers"))
        self._index_bytes = self.stream.get_index_size()  # now: the folder may be removed under a run
        # Shards that an earlier run left take space, but are as good as remote until they are verified.
        self._unverified = [i for i, shard in enumerate(self.shards) if self.stream.bytes_here(shard)]
        if dist.get_local_rank() == 0:
            for shard_id in self._unverified:
                self._shard_states[shard_id] = ShardState.REMOTE
            if cache_limit:
                self._check_limit(bytes_to_int(cache_limit), shuffle_block_size)

    @override
    def _resume(self, world: World, epoch: int) -> tuple[int, int]:
        # Of each epoch and each checkpoint the base class leaves a descriptor open, until there are no more.
        with closed_afterwards(streaming_dataset):
            return super()._resume(world, epoch)

    def _occupy(self, local: Path) -> None:
        try:
            descriptor = acquire(local / ".in_use", wait=LAST_USER_LEAVES)
        except OSError as error:
            raise InputError(f"{local}: shards cannot be kept there ({reason(error)})") from error
        if descriptor is None:
            raise InputError(f"{local}: another run keeps its shards there: give each a folder of its own")
        weakref.finalize(self, os.close, descriptor)

    def _check_limit(self, limit: int, shuffle_block_size: int) -> None:
        smallest = self._index_bytes + 4 * max(shard.get_max_size() for shard in self.shards)
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
        self.epoch, sample_in_epoch = self._resume_incr_epoch()
        sample_ids = self._get_work(self.epoch, sample_in_epoch)
        sample_ids = sample_ids[sample_ids != -1]  # padding, where the parts are not equal

        assert self.predownload is not None  # the base class sets one
        ahead = Lookahead(sample_ids, self.predownload)
        # A daemon: a process that ends must not wait for one that waits for a store.
        thread = threading.Thread(target=self._fetch_ahead, args=(ahead,), daemon=True)
        thread.start()
        interpreter_ends = sys.is_finalizing  # when it does, there may be no more globals
        try:
            for sample_id in sample_ids:
                yield self[int(sample_id)]
                ahead.num_read += 1
        finally:
            ahead.stop.set()
            if not interpreter_ends():  # where it does, the thread never will
                thread.join()  # what it fetches would for ever look as if it were being fetched

    def _fetch_ahead(self, ahead: "Lookahead") -> None:
        for shard_id in ahead.shards(self):
            try:
                self.prepare_shard(shard_id, blocking=False, stop=ahead.stop)
            except Exception as error:  # noqa: BLE001
                log.debug("%s", error)  # who reads the shard will meet the same fault, and raise it

    @override
    def get_item(self, sample_id: int, retry: int = READ_ATTEMPTS) -> dict[str, Any]:
        """One sample as it is stored.

        Raises:
            ShardError: Its shard cannot be had.
        """
        shard_id, sample_in_shard = self.spanner[sample_id]
        for _ in range(retry):
            if self._shard_states[shard_id] != ShardState.LOCAL:
                self.prepare_shard(shard_id)
            try:
                sample = self.shards[shard_id][sample_in_shard]
            except FileNotFoundError:
                self._note_loss(shard_id)
                continue
            except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # where the index has no hash
                raise ShardError(
                    f"{self.folder}: shard {shard_id} is damaged: its sample {sample_in_shard} cannot be read "
                    f"({reason(error)})"
                ) from error
            self._shard_access_times[shard_id] = time.time_ns()
            return sample
        raise ShardError(
            f"{self.folder}: shard {shard_id} was evicted {retry} times before sample {sample_id} could be read: "
            f"cache_limit {self.cache_limit} is too small"
        )

    @override
    def prepare_shard(self, shard_id: int, blocking: bool = True, stop: threading.Event | None = None) -> None:
        """Fetch and verify a shard, unless another process of this machine does.

        Args:
            shard_id: Which.
            blocking: Whether to wait for that process, and for room in the cache.
            stop: Ends waiting for the store, where it is set.

        Raises:
            ShardError: It cannot be had.
        """
        while (before := self._claim(shard_id)) is None:
            if not blocking or self._shard_states[shard_id] == ShardState.LOCAL:
                return
            time.sleep(TICK)
            self._take_over_if_deserted(shard_id)
        # Where another gave it up, its patience is not spent twice.
        timeout = 0 if before == ShardState.INVALID else None
        state = ShardState.REMOTE
        try:
            self.stream.fetch_shard(self.shards[shard_id], timeout, stop)
            state = ShardState.LOCAL
        except ShardError:
            if stop is None or not stop.is_set():
                state = ShardState.INVALID
            raise
        finally:
            self._release(shard_id, state)

    def _claim(self, shard_id: int) -> int | None:
        """Make a shard that is not here this process's to fetch, with room for it; what its state was before."""
        if self._shard_states[shard_id] in (ShardState.LOCAL, ShardState.PREPARING):
            return None
        with self._cache_lock():
            state = int(self._shard_states[shard_id])
            if state in (ShardState.LOCAL, ShardState.PREPARING) or not self._make_room(shard_id):
                return None
            shard = self.shards[shard_id]
            self.cache_usage += shard.get_max_size() - self.stream.bytes_here(shard)
            self._fetchers[shard_id] = os.getpid()
            self._shard_states[shard_id] = ShardState.PREPARING
            return state

    def _release(self, shard_id: int, state: ShardState) -> None:
        with self._cache_lock():
            shard = self.shards[shard_id]
            self.cache_usage += self.stream.bytes_here(shard) - shard.get_max_size()
            self._shard_access_times[shard_id] = time.time_ns()
            self._shard_states[shard_id] = state

    def _take_over_if_deserted(self, shard_id: int) -> None:
        """Let go of a shard whose fetching process was killed."""
        with self._cache_lock():
            preparing = self._shard_states[shard_id] == ShardState.PREPARING
            if preparing and not _is_alive(int(self._fetchers[shard_id])):
                self._release(shard_id, ShardState.REMOTE)

    def _note_loss(self, shard_id: int) -> None:
        """A shard that is said to be here is not: evicted just now, or deleted by somebody."""
        with self._cache_lock():
            if self._shard_states[shard_id] == ShardState.LOCAL:
                self._shard_states[shard_id] = ShardState.REMOTE
                self._recount()

    def _recount(self) -> None:
        """Set the cache's usage to what is on disk, and what will be."""
        fetched = set(np.flatnonzero(self._shard_states.numpy() == ShardState.PREPARING).tolist())
        self.cache_usage = self._index_bytes + sum(
            shard.get_max_size() if i in fetched else self.stream.bytes_here(shard)
            for i, shard in enumerate(self.shards)
        )

    def _make_room(self, shard_id: int) -> bool:
        """Evict shards until there is room for this one; ``False``: what takes it is being fetched just now.

        Raises:
            ShardError: Something else takes it.
        """
        if not self.cache_limit:
            return True
        assert isinstance(self.cache_limit, int)
        needed = self.shards[shard_id].get_max_size() - self.stream.bytes_here(self.shards[shard_id])
        recounted = False
        while self.cache_usage + needed > self.cache_limit:
            if (coldest := self._coldest_shard(shard_id)) is not None:
                self._evict_shard(coldest)
            elif (self._shard_states.numpy() == ShardState.PREPARING).any():
                return False
            elif recounted:
                raise ShardError(f"{self.folder}: cache_limit {self.cache_limit} has no room for shard {shard_id}")
            else:  # shards deleted by somebody still count
                self._recount()
                recounted = True
        return True

    @override
    def _evict_shard(self, shard_id: int) -> None:
        before = self._shard_states[shard_id]
        try:
            super()._evict_shard(shard_id)
        except OSError as error:
            self._shard_states[shard_id] = before
            raise ShardError(f"{self.folder}: shard {shard_id} cannot be evicted: {reason(error)}") from error

    def _coldest_shard(self, wanted: int) -> int | None:
        """What is best evicted: a shard that nobody has used in this run, or the one whose last use is longest ago."""
        while self._unverified:
            shard_id = self._unverified[-1]
            remote = self._shard_states[shard_id] == ShardState.REMOTE
            if remote and shard_id != wanted and self.stream.bytes_here(self.shards[shard_id]):
                return shard_id  # which stays on the list until it is really gone
            self._unverified.pop()
        here = np.flatnonzero(self._shard_states.numpy() == ShardState.LOCAL)
        if not len(here):
            return None
        return int(here[np.argmin(self._shard_access_times.numpy()[here])])

    @contextmanager
    def _cache_lock(self) -> Iterator[None]:
        # Made where it is used: a lock cannot be pickled into a worker.
        if not hasattr(self, "_cache_filelock"):
            self._cache_filelock = FileLock(self._cache_filelock_path)
        with self._cache_filelock:
            yield


class Lookahead:
    """Which shards a worker will need next, as far as it may look.

    Args:
        sample_ids: (N,) what it will read, in this order.
        num_samples: How far it looks beyond what it has read.
    """

    def __init__(self, sample_ids: NDArray[np.int64], num_samples: int) -> None:
        self.sample_ids = sample_ids
        self.num_samples = num_samples
        self.num_read = 0
        self.stop = threading.Event()

    def shards(self, dataset: StreamingDataset) -> Iterator[int]:
        """The shard of each sample not yet read, once it is near enough, until :attr:`stop` is set."""
        for i, sample_id in enumerate(self.sample_ids):
            while i > self.num_read + self.num_samples and not self.stop.wait(TICK):
                pass
            if self.stop.is_set():
                return
            if i >= self.num_read:
                yield dataset.spanner[int(sample_id)][0]


@contextmanager
def _starting_alone() -> Iterator[None]:
    """One run of a machine (and user) at a time: Streaming looks for free names in shared memory, then takes them."""
    place = find_node_place()
    # Not below the home folder, which the machines of one run may share: they have to start together.
    lock = machine_lock("start")
    first_here = place.number == 0 and dist.get_local_rank() == 0
    turn = sole_user(lock, STARTING_SECONDS) if first_here else nullcontext(False)
    with turn as is_our_turn, separate_numbers(place):
        if is_our_turn:
            remove_abandoned()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # the other ranks of this run look as well
        yield


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
