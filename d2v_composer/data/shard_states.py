"""The state of each shard on a machine, shared by all processes of a run.

    | state      | the shard                                 | what ends the state                              |
    | ---------- | ----------------------------------------- | ------------------------------------------------ |
    | ABSENT     | has no file here                          | claim → FETCHING                                 |
    | UNVERIFIED | has a file that this run has not verified | claim → FETCHING; eviction, loss → ABSENT        |
    | FETCHING   | is fetched by the thread that claimed it  | release → VERIFIED, ABSENT, UNVERIFIED or FAILED |
    | VERIFIED   | can be read                               | eviction, loss → ABSENT                          |
    | FAILED     | could not be fetched within the timeout   | claim → RETRYING                                 |
    | RETRYING   | is fetched once more, in a single attempt | as FETCHING                                      |

States are read without a lock, and changed only while holding the cache's lock. If the thread that fetches a shard no
longer exists, because its process was killed, a thread that waits for the shard releases it.
"""

import os
import threading
import time
from enum import IntEnum

import numpy as np
import psutil
from numpy.typing import NDArray
from streaming.base.shared import SharedArray

__all__ = ["ShardState", "ShardStates"]


class ShardState(IntEnum):
    """The state of a shard. ABSENT has the number that Streaming gives to a shard without files."""

    FAILED = 0
    ABSENT = 1
    FETCHING = 2
    VERIFIED = 3
    UNVERIFIED = 4
    RETRYING = 5

    @property
    def is_being_fetched(self) -> bool:
        """True if a thread has claimed the shard."""
        return self in (ShardState.FETCHING, ShardState.RETRYING)


class ShardStates:
    """The states of S shards, their last uses, and the threads that fetch them.

    Args:
        states: (S,) uint8.
        access_times: (S,) uint64, in ns.
        fetchers: (2 · S,) int64: process and thread of each.
    """

    def __init__(self, states: SharedArray, access_times: SharedArray, fetchers: SharedArray) -> None:
        self._states = states
        self._access_times = access_times
        self._fetchers = fetchers

    def __getitem__(self, shard_id: int) -> ShardState:
        return ShardState(self._states[shard_id])

    def __setitem__(self, shard_id: int, state: ShardState) -> None:
        self._states[shard_id] = state

    def numpy(self) -> NDArray[np.uint8]:
        """Return the states, (S,), as an array that can be written."""
        return self._states.numpy()

    def are(self, *states: ShardState) -> NDArray[np.bool_]:
        """Return, (S,), whether each shard has one of these states."""
        return np.logical_or.reduce([self.numpy() == state for state in states])

    def are_being_fetched(self) -> NDArray[np.bool_]:
        """Return, (S,), whether a thread has claimed each shard."""
        return self.are(ShardState.FETCHING, ShardState.RETRYING)

    def touch(self, shard_id: int) -> None:
        """Note that a shard is used now."""
        self._access_times[shard_id] = time.time_ns()

    def coldest(self, wanted: int) -> int | None:
        """Return the shard to evict first, the one used longest ago; ``None`` if no other than ``wanted`` has a file.

        The files of an earlier run come first: this run has not used them.
        """
        can_be_evicted = self.are(ShardState.UNVERIFIED, ShardState.VERIFIED)
        can_be_evicted[wanted] = False
        candidates = np.flatnonzero(can_be_evicted)
        if not len(candidates):
            return None
        return int(candidates[np.argmin(self._access_times.numpy()[candidates])])

    def note_fetcher(self, shard_id: int) -> None:
        """Note that this thread fetches a shard."""
        self._fetchers[2 * shard_id : 2 * shard_id + 2] = os.getpid(), threading.get_native_id()

    def is_abandoned(self, shard_id: int) -> bool:
        """Return True if the thread that fetches a shard no longer exists."""
        process, thread = self._fetchers[2 * shard_id : 2 * shard_id + 2].tolist()
        return self[shard_id].is_being_fetched and not _is_alive(process, thread)


def _is_alive(process: int, thread: int) -> bool:
    try:
        found = psutil.Process(process)
        return found.status() != psutil.STATUS_ZOMBIE and thread in {each.id for each in found.threads()}
    except psutil.NoSuchProcess:
        return False
