"""The shards of a data set on this machine: which thread fetches which, and which are evicted where there is no room.

The state of each shard is in shared memory, for all processes of the machine:

    REMOTE ── claim ──▸ PREPARING ── release ──▸ LOCAL ── evicted, or lost ──▸ REMOTE
                            ├──▸ GIVEN_UP: the next thread that needs it tries once, without this one's patience
                            └──▸ REMOTE: the fetch was stopped, or its thread is gone

A state is read without a lock and changed with the cache's lock.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import numpy as np
import psutil
from filelock import FileLock
from streaming.base.dataset import _ShardState as ShardState
from streaming.base.format.base.reader import Reader
from streaming.base.shared import SharedArray, SharedScalar

from d2v_composer.data.verified_stream import ShardError, VerifiedStream
from d2v_composer.system.errors import InputError
from d2v_composer.system.retry import reason

__all__ = ["GIVEN_UP", "Claim", "ShardCache", "ShardState"]

GIVEN_UP = ShardState.INVALID  # Streaming's number for a state of ours
SHORTEST_PAUSE, LONGEST_PAUSE = 0.002, 0.05
# How often a thread that waits makes sure that the thread it waits for still exists.
CHECK_SECONDS = 1.0
LOCK_POLL_SECONDS = 0.005
# Of shards that are fetched before they are needed, on a machine. A connection to an object store brings about what a
# core decodes.
FEWEST_AHEAD, MOST_AHEAD = 4, 64

log = logging.getLogger(__name__)


class Claim(Enum):
    """The answer to a thread that would fetch a shard."""

    HERE = "nothing is to be fetched"
    TAKEN = "another thread fetches it"
    NO_PLACE = "there is no room yet, or enough shards are fetched ahead"
    LEFT = "it was given up, and is left to the thread that needs it"
    OURS = "this thread is to fetch it"
    OURS_ONCE = "this thread is to fetch it, in one attempt: another gave it up"

    @property
    def is_ours(self) -> bool:
        """Whether this thread is to fetch the shard, and to release it."""
        return self in (Claim.OURS, Claim.OURS_ONCE)


class ShardCache:
    """The shards that are here, those that are being fetched, and the room for them.

    Each shard is verified before its first use in a run (see :class:`VerifiedStream`), once a machine. Shared by all
    processes of a run on a machine; it can be pickled.

    Args:
        stream: Fetches and verifies.
        states: (shards,) of all processes; see the module.
        access_times: (shards,) when each was last used, in ns.
        fetchers: (2 · shards,) process and thread that fetch each, while it is ``PREPARING``.
        is_replaced: Whether the folder is another data set's by now.
        usage: What the folder holds and will hold once all is fetched, in bytes.
        index_bytes: What its index takes of that.
        limit: What it may hold.
        lock_path: A file for the lock.
    """

    def __init__(
        self,
        stream: VerifiedStream,
        shards: Sequence[Reader],
        *,
        states: SharedArray,
        access_times: SharedArray,
        fetchers: SharedArray,
        is_replaced: SharedScalar,
        usage: SharedScalar,
        index_bytes: int,
        limit: int | None,
        lock_path: str,
    ) -> None:
        self.stream = stream
        self.shards = shards
        self.states = states
        self._fetchers = fetchers
        self._is_replaced = is_replaced
        self.index_bytes = index_bytes
        self.limit = limit
        self._access_times = access_times
        self._usage = usage
        self._lock_path = lock_path
        self._filelock: FileLock | None = None
        self._filelock_pid = 0
        self._unverified = self._shards_here()
        self._most_ahead = max(FEWEST_AHEAD, min(os.cpu_count() or 1, MOST_AHEAD))
        if limit:  # at least half of it is for shards that are needed now
            self._most_ahead = max(1, min(self._most_ahead, limit // (2 * max(map(_size, shards)))))

    def forget_unverified(self) -> None:
        """Let the shards of an earlier run be verified before they are used; for one process, before any reads."""
        for shard_id in self._unverified:
            self.states[shard_id] = ShardState.REMOTE

    def _shards_here(self) -> list[int]:
        # Shards that an earlier run left take space, but are as good as remote until they are verified.
        return [i for i, shard in enumerate(self.shards) if self.stream.bytes_here(shard)]

    def recount(self) -> None:
        """Look anew which shards are here; before any reads."""
        with self._lock():
            self._unverified = self._shards_here()
            self._recount()

    def give_way(self, wait: float) -> None:
        """Fetch and evict no shard from now on: another cache of this process does, in the same folder.

        Args:
            wait: For shards that are being fetched, in seconds.

        Raises:
            InputError: One still is after that time; this cache stays in use.
        """
        with self._lock():
            self._is_replaced.set(1)
        deadline = time.monotonic() + wait
        while len(fetched := np.flatnonzero(self.states.numpy() == ShardState.PREPARING)):
            if time.monotonic() > deadline:
                self._is_replaced.set(0)
                raise InputError(f"{self.stream.local}: this process still fetches shards there for another data set")
            for shard_id in fetched:
                self.take_over_if_deserted(int(shard_id))
            time.sleep(LONGEST_PAUSE)

    def is_here(self, shard_id: int) -> bool:
        """Whether a shard is here and verified; it may be evicted at any time."""
        return self.states[shard_id] == ShardState.LOCAL

    def touch(self, shard_id: int) -> None:
        """Note that a shard was used now."""
        self._access_times[shard_id] = time.time_ns()

    def prepare(self, shard_id: int) -> None:
        """Fetch and verify a shard, or wait for the thread that does.

        Raises:
            ShardError: It cannot be had.
        """
        pause, next_check = SHORTEST_PAUSE, time.monotonic() + CHECK_SECONDS
        while not (claim := self.claim(shard_id)).is_ours:
            if claim is Claim.HERE:
                return
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            if time.monotonic() >= next_check:
                self.take_over_if_deserted(shard_id)
                next_check = time.monotonic() + CHECK_SECONDS
        self.fetch(shard_id, claim)

    def fetch(self, shard_id: int, claim: Claim, stop: threading.Event | None = None) -> None:
        """Fetch and verify a shard that this thread claimed, and release it.

        Args:
            shard_id: Which.
            claim: What :meth:`claim` answered, to this thread or for it.
            stop: Ends fetching, where it is set.

        Raises:
            ShardError: It cannot be had.
        """
        state = ShardState.REMOTE
        try:
            self._note_fetcher(shard_id)
            # Where another thread gave it up, its patience is not spent twice.
            self.stream.fetch_shard(self.shards[shard_id], 0 if claim is Claim.OURS_ONCE else None, stop)
            state = ShardState.LOCAL
        except ShardError:
            if stop is None or not stop.is_set():
                state = GIVEN_UP
            raise
        finally:
            self.release(shard_id, state)

    def claim(self, shard_id: int, ahead: bool = False) -> Claim:
        """Make a shard that is not here this thread's to fetch, with room for it, if it may be.

        Args:
            shard_id: Which.
            ahead: It is not needed yet.

        Raises:
            ShardError: There never will be room, or the folder is another data set's by now.
        """
        if (refusal := self._refusal(shard_id, ahead)) is not None:
            return refusal  # threads that wait come here again and again: without the lock
        with self._lock():
            if (refusal := self._refusal(shard_id, ahead)) is not None:
                return refusal
            if self._is_replaced.get():
                raise ShardError(f"{self.stream.local}: a newer data set of this process has taken the folder over")
            if not self._make_room(shard_id):
                return Claim.NO_PLACE
            claim = Claim.OURS_ONCE if self.states[shard_id] == GIVEN_UP else Claim.OURS
            shard = self.shards[shard_id]
            self._add_usage(_size(shard) - self.stream.bytes_here(shard))
            self._note_fetcher(shard_id)
            self.states[shard_id] = ShardState.PREPARING
            return claim

    def _note_fetcher(self, shard_id: int) -> None:
        self._fetchers[2 * shard_id : 2 * shard_id + 2] = os.getpid(), threading.get_native_id()

    def _refusal(self, shard_id: int, ahead: bool) -> Claim | None:
        """Why a shard is not to be fetched by this thread now, as far as can be told without the lock."""
        state = self.states[shard_id]
        if state == ShardState.LOCAL:
            return Claim.HERE
        if state == ShardState.PREPARING:
            return Claim.TAKEN
        if ahead and state == GIVEN_UP:
            return Claim.LEFT
        states = self.states.numpy()
        num_fetched = np.count_nonzero(states == ShardState.PREPARING)
        if ahead and num_fetched >= self._most_ahead:
            return Claim.NO_PLACE
        nothing_to_evict = not self._unverified and not (states == ShardState.LOCAL).any()
        return Claim.NO_PLACE if num_fetched and nothing_to_evict and not self._has_room(shard_id) else None

    def release(self, shard_id: int, state: ShardState) -> None:
        """Say what became of a shard that was claimed."""
        with self._lock():
            self._release(shard_id, state)

    def _release(self, shard_id: int, state: ShardState) -> None:
        shard = self.shards[shard_id]
        self._add_usage(self.stream.bytes_here(shard) - _size(shard))
        self.touch(shard_id)
        self.states[shard_id] = state

    def take_over_if_deserted(self, shard_id: int) -> None:
        """Let go of a shard whose fetching thread is gone."""
        if not self._is_deserted(shard_id):
            return
        with self._lock():
            if self._is_deserted(shard_id):
                self._release(shard_id, ShardState.REMOTE)

    def _is_deserted(self, shard_id: int) -> bool:
        process, thread = self._fetchers[2 * shard_id : 2 * shard_id + 2].tolist()
        return self.states[shard_id] == ShardState.PREPARING and not _is_alive(process, thread)

    def note_loss(self, shard_id: int) -> None:
        """Note that a shard which is said to be here is not: evicted just now, or deleted by another program."""
        with self._lock():
            if self.states[shard_id] == ShardState.LOCAL:
                self.states[shard_id] = ShardState.REMOTE
                self._recount()

    def _add_usage(self, num_bytes: int) -> None:
        self._usage.set(int(self._usage.get()) + num_bytes)

    def _recount(self) -> None:
        """Set the usage to what is on disk, and what will be."""
        here = [self.stream.bytes_here(shard) for shard in self.shards]
        for shard_id in np.flatnonzero(self.states.numpy() == ShardState.PREPARING):
            here[shard_id] = _size(self.shards[shard_id])
        self._usage.set(self.index_bytes + sum(here))

    def _has_room(self, shard_id: int) -> bool:
        if not self.limit:
            return True
        shard = self.shards[shard_id]
        return int(self._usage.get()) + _size(shard) - self.stream.bytes_here(shard) <= self.limit

    def _make_room(self, shard_id: int) -> bool:
        """Evict shards until there is room for this one; ``False``: what takes it is being fetched just now.

        Raises:
            ShardError: Something else takes it.
        """
        recounted = False
        while not self._has_room(shard_id):
            if (coldest := self.coldest_shard(shard_id)) is not None:
                self._evict(coldest)
            elif (self.states.numpy() == ShardState.PREPARING).any():
                return False
            elif recounted:
                raise ShardError(f"{self.stream.local}: cache_limit {self.limit} has no room for shard {shard_id}")
            else:  # shards that another program deleted still count
                self._recount()
                recounted = True
        return True

    def _evict(self, shard_id: int) -> None:
        before = self.states[shard_id]
        self.states[shard_id] = (
            ShardState.REMOTE
        )  # a thread that is about to read it finds no file, and fetches it again
        try:
            self._add_usage(-self.shards[shard_id].evict())
        except OSError as error:
            self.states[shard_id] = before
            raise ShardError(f"{self.stream.local}: shard {shard_id} cannot be evicted: {reason(error)}") from error

    def coldest_shard(self, wanted: int) -> int | None:
        """The shard to evict first: one that nothing used in this run, or the one whose last use is longest ago."""
        while self._unverified:
            shard_id = self._unverified[-1]
            remote = self.states[shard_id] == ShardState.REMOTE
            if remote and shard_id != wanted and self.stream.bytes_here(self.shards[shard_id]):
                return shard_id  # which stays on the list until it is really gone
            self._unverified.pop()
        here = np.flatnonzero(self.states.numpy() == ShardState.LOCAL)
        if not len(here):
            return None
        return int(here[np.argmin(self._access_times.numpy()[here])])

    @contextmanager
    def _lock(self) -> Iterator[None]:
        # Made where it is used: a lock can be neither pickled into a worker nor, locked or not, be inherited by one.
        if self._filelock is None or self._filelock_pid != os.getpid():
            self._filelock = FileLock(self._lock_path, poll_interval=LOCK_POLL_SECONDS)
            self._filelock_pid = os.getpid()
        with self._filelock:
            yield

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_filelock": None}


def _size(shard: Reader) -> int:
    return shard.get_max_size()


def _is_alive(process: int, thread: int) -> bool:
    try:
        found = psutil.Process(process)
        return found.status() != psutil.STATUS_ZOMBIE and thread in {each.id for each in found.threads()}
    except psutil.NoSuchProcess:
        return False
