"""Claim, fetch and evict the shards of a data set on this machine; shard_states.py defines the states of a shard."""

import os
import threading
import time
from collections.abc import Sequence
from enum import Enum

import numpy as np
from filelock import FileLock
from streaming.base.format.base.reader import Reader
from streaming.base.shared import SharedScalar

from d2v_composer.data.shard_states import ShardState, ShardStates
from d2v_composer.data.verified_stream import VerifiedStream
from d2v_composer.system.errors import InputError, ShardError
from d2v_composer.system.retry import reason

__all__ = ["Claim", "ShardCache"]

SHORTEST_PAUSE, LONGEST_PAUSE = 0.002, 0.05
# How often a waiting thread checks that the thread it waits for still exists.
CHECK_SECONDS = 1.0
LOCK_POLL_SECONDS = 0.005
# Shards that a machine fetches ahead at a time. One connection to an object store delivers about what one core decodes.
FEWEST_AHEAD, MOST_AHEAD = 4, 64


class Claim(Enum):
    """The answer to a thread that asks to fetch a shard."""

    FETCH = "this thread must fetch the shard, and release it"
    WAIT = "another thread fetches the shard, there is no room for it yet, or enough shards are fetched ahead"
    SKIP = "the shard is here; or, to a thread that fetches ahead: another thread fetches it, or failed to"


class ShardCache:
    """The shards of a data set in a local folder, used by all processes of a run on a machine. It can be pickled.

    Args:
        stream: Fetches and verifies the shards.
        shards: The shards, as the index lists them.
        states: Their states.
        usage: Shared: the bytes in the folder once all that is being fetched has arrived.
        is_replaced: Shared: 1 once a newer data set of this process uses the folder.
        limit: The most bytes that the folder may hold; ``None`` or 0: no limit.
        lock_path: The file of the lock.
    """

    def __init__(
        self,
        stream: VerifiedStream,
        shards: Sequence[Reader],
        *,
        states: ShardStates,
        usage: SharedScalar,
        is_replaced: SharedScalar,
        limit: int | None,
        lock_path: str,
    ) -> None:
        self.stream = stream
        self.shards = shards
        self.states = states
        self.limit = limit
        self.index_bytes = stream.get_index_size()  # now: the folder may be removed during the run
        self._usage = usage
        self._is_replaced = is_replaced
        self._lock_path = lock_path
        self._sizes = np.array([shard.get_max_size() for shard in shards])
        self._most_ahead = max(FEWEST_AHEAD, min(os.cpu_count() or 1, MOST_AHEAD))
        if limit:  # at least half of it is for shards that are needed now
            self._most_ahead = max(1, min(self._most_ahead, limit // (2 * int(self._sizes.max()))))

    def is_here(self, shard_id: int) -> bool:
        """Return True if a shard is verified and can be read; it may be evicted at any time."""
        return self.states[shard_id] == ShardState.VERIFIED

    def prepare(self, shard_id: int) -> None:
        """Fetch and verify a shard, or wait for the thread that does.

        Raises:
            ShardError: The shard cannot be fetched.
        """
        pause, next_check = SHORTEST_PAUSE, time.monotonic() + CHECK_SECONDS
        while (claim := self.claim(shard_id)) is Claim.WAIT:
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            if time.monotonic() >= next_check:
                self._release_if_abandoned(shard_id)
                next_check = time.monotonic() + CHECK_SECONDS
        if claim is Claim.FETCH:
            self.fetch(shard_id)

    def claim(self, shard_id: int, ahead: bool = False) -> Claim:
        """Ask to fetch a shard. If the answer is FETCH, there is room for it, and no other thread fetches it.

        Args:
            shard_id: The shard.
            ahead: The shard is not needed yet.

        Raises:
            ShardError: There will never be room, or a newer data set uses the folder.
        """
        if (refusal := self._refusal(shard_id, ahead)) is not None:
            return refusal  # without the lock: waiting threads ask again and again
        with self._lock():
            if (refusal := self._refusal(shard_id, ahead)) is not None:
                return refusal
            if self._is_replaced.get():
                raise ShardError(f"{self.stream.local}: a newer data set of this process uses the folder now")
            if not self._make_room(shard_id):
                return Claim.WAIT
            has_failed = self.states[shard_id] == ShardState.FAILED
            self._add_usage(self._bytes_to_come(shard_id))
            self.states.note_fetcher(shard_id)  # before the state, which makes others look at it
            self.states[shard_id] = ShardState.RETRYING if has_failed else ShardState.FETCHING
            return Claim.FETCH

    def fetch(self, shard_id: int, stop: threading.Event | None = None) -> None:
        """Fetch and verify a shard that this thread, or the one that started it, has claimed; then release it.

        Args:
            shard_id: The shard.
            stop: Ends the fetch when set.

        Raises:
            ShardError: The shard cannot be fetched.
        """
        state = ShardState.ABSENT
        try:
            self.states.note_fetcher(shard_id)
            timeout = 0 if self.states[shard_id] == ShardState.RETRYING else None
            self.stream.fetch_shard(self.shards[shard_id], timeout, stop)
            state = ShardState.VERIFIED
        except ShardError:
            if stop is None or not stop.is_set():
                state = ShardState.FAILED
            raise
        finally:
            self.release(shard_id, state)

    def release(self, shard_id: int, state: ShardState = ShardState.ABSENT) -> None:
        """End the fetch of a shard that was claimed, in this state; if ABSENT but with a file, in UNVERIFIED."""
        with self._lock():
            self._release(shard_id, state)

    def note_loss(self, shard_id: int) -> None:
        """Note that the file of a verified shard is gone: it was just evicted, or another program deleted it."""
        with self._lock():
            if self.is_here(shard_id):
                self.states[shard_id] = ShardState.ABSENT
                self._count()

    def count(self) -> None:
        """Set the usage, and the states of shards that an earlier run left or that were deleted, by the files here."""
        with self._lock():
            self._count()

    def give_way(self, timeout: float) -> None:
        """Stop fetching and evicting, because another cache of this process will use the folder.

        Args:
            timeout: How long to wait for shards that are being fetched, in seconds.

        Raises:
            InputError: A shard is still being fetched after that time; this cache stays in use.
        """
        with self._lock():
            self._is_replaced.set(1)
        deadline = time.monotonic() + timeout
        while len(fetched := np.flatnonzero(self.states.are_being_fetched())):
            if time.monotonic() > deadline:
                self._is_replaced.set(0)
                raise InputError(f"{self.stream.local}: another data set of this process still fetches shards there")
            for shard_id in fetched:
                self._release_if_abandoned(int(shard_id))
            time.sleep(LONGEST_PAUSE)

    def _lock(self) -> FileLock:
        # A new one each time: a lock can neither be pickled nor, locked or not, be inherited by a forked worker.
        return FileLock(self._lock_path, poll_interval=LOCK_POLL_SECONDS)

    def _refusal(self, shard_id: int, ahead: bool) -> Claim | None:
        """Return why a thread must not fetch a shard now, as far as can be known without the lock."""
        state = self.states[shard_id]
        if state == ShardState.VERIFIED or (ahead and (state.is_being_fetched or state == ShardState.FAILED)):
            return Claim.SKIP
        num_fetched = np.count_nonzero(self.states.are_being_fetched())
        is_full = num_fetched and not self._has_room(shard_id) and self.states.coldest(shard_id) is None
        if state.is_being_fetched or is_full or (ahead and num_fetched >= self._most_ahead):
            return Claim.WAIT
        return None

    def _make_room(self, shard_id: int) -> bool:
        """Evict shards until there is room for this one; return False if shards that are being fetched take the room.

        Raises:
            ShardError: Something else takes the room.
        """
        is_counted = False
        while not self._has_room(shard_id):
            if (coldest := self.states.coldest(shard_id)) is not None:
                self._evict(coldest)
            elif self.states.are_being_fetched().any():
                return False
            elif is_counted:
                raise ShardError(f"{self.stream.local}: cache_limit {self.limit} has no room for shard {shard_id}")
            else:  # the usage includes shards that another program deleted
                self._count()
                is_counted = True
        return True

    def _evict(self, shard_id: int) -> None:
        before = self.states[shard_id]
        # First: a thread that is about to read the shard then finds no file, and fetches it again.
        self.states[shard_id] = ShardState.ABSENT
        try:
            self._add_usage(-self.shards[shard_id].evict())
        except FileNotFoundError:  # another program deleted it at this moment
            return
        except OSError as error:
            self.states[shard_id] = before
            raise ShardError(f"{self.stream.local}: shard {shard_id} cannot be evicted: {reason(error)}") from error

    def _release(self, shard_id: int, state: ShardState) -> None:
        self._add_usage(-self._bytes_to_come(shard_id))
        self.states.touch(shard_id)
        has_file = self.stream.bytes_here(self.shards[shard_id]) > 0
        self.states[shard_id] = ShardState.UNVERIFIED if state == ShardState.ABSENT and has_file else state

    def _release_if_abandoned(self, shard_id: int) -> None:
        if self.states.is_abandoned(shard_id):
            with self._lock():
                if self.states.is_abandoned(shard_id):
                    self._release(shard_id, ShardState.ABSENT)

    def _count(self) -> None:
        num_bytes = np.array([self.stream.bytes_here(shard) for shard in self.shards])
        has_file = num_bytes > 0
        states = self.states.numpy()
        states[self.states.are(ShardState.ABSENT) & has_file] = ShardState.UNVERIFIED
        states[self.states.are(ShardState.UNVERIFIED, ShardState.VERIFIED) & ~has_file] = ShardState.ABSENT
        num_bytes = np.where(self.states.are_being_fetched(), self._sizes, num_bytes)
        self._usage.set(self.index_bytes + int(num_bytes.sum()))

    def _add_usage(self, num_bytes: int) -> None:
        self._usage.set(int(self._usage.get()) + num_bytes)

    def _has_room(self, shard_id: int) -> bool:
        return not self.limit or int(self._usage.get()) + self._bytes_to_come(shard_id) <= self.limit

    def _bytes_to_come(self, shard_id: int) -> int:
        return int(self._sizes[shard_id]) - self.stream.bytes_here(self.shards[shard_id])
