"""Read the samples of an MDS data set, local or in an object store, from verified shards.

Any number of processes and runs may share a cache. A fetched shard gets its final file name only after it is complete
and matches the index.
"""

import json
import logging
import os
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from itertools import accumulate
from pathlib import Path

from torch.utils.data import get_worker_info

from d2v_composer.data.modality import Stored
from d2v_composer.sources.mds import INDEX, SUMMARY, Index
from d2v_composer.system.addresses import hide_secrets
from d2v_composer.system.errors import InputError, ShardError, reading, reason, writing
from d2v_composer.system.fetch import is_lasting, is_local, retry, transfer
from d2v_composer.system.files import PARTIAL, find_partials, partial_file, sole_user
from d2v_composer.system.processes import local_ranks

# How long a store may send nothing, or almost nothing, before the request is repeated: for an index, for a shard.
INDEX_REQUEST_SECONDS, REQUEST_SECONDS = 60.0, 20
# How often a thread that waits for another one's shard looks again.
POLL_SECONDS = 0.02
# Shards that a machine fetches ahead at a time. One connection to an object store delivers about what one core decodes.
MIN_AHEAD, MAX_AHEAD = 4, 64
# The cache's folder of lock files: one for each shard, and one for making room.
LOCKS = ".locks"
# Suffix of a file beside a partial one, which reserves room for the whole shard.
RESERVED = "reserved"

log = logging.getLogger(__name__)


def fetch_index(remote: str, local: Path, retry_timeout: float = 0.0) -> None:
    """Fetch ``index.json`` and, if it exists, ``conversion.json`` of a remote data set to its cache.

    If the store is unreachable, the cached files are used, with a warning.
    """
    for name in (INDEX, SUMMARY):
        index, address = local / name, f"{remote.rstrip('/')}/{name}"
        here = index.read_bytes() if index.exists() else None
        try:
            with partial_file(index) as fetched:
                timeout = retry_timeout if here is None else 0.0
                retry(partial(transfer, address, fetched, INDEX_REQUEST_SECONDS), address, timeout, lasting_attempts=1)
                with reading(address):
                    json.loads(fetched.read_bytes())
                if here not in (None, fetched.read_bytes()):
                    raise InputError(
                        f"{local} is the cache of another data set, or of an older version of {remote}; choose another "
                        "folder"
                    )
        except InputError:
            raise
        except Exception as error:
            message = f"{hide_secrets(address)} cannot be fetched ({reason(error)})"
            if not is_lasting(error) and not is_local(error) and here is not None:
                log.warning("%s; using the file in %s", message, local)
            elif name == INDEX or not is_lasting(error):
                raise InputError(message) from error
            return


class NoRoomError(Exception):
    """The cache has no room for another shard yet."""


class Shards:
    """The samples of an MDS data set, indexed from 0.

    Args:
        index: The data set's index.
        cache_limit: Maximum size of the cache, in bytes; default: no limit.
        timeout: Seconds for which an unreachable store is retried.

    Attributes:
        limit: The cache limit in bytes; 0 for no limit.
    """

    def __init__(self, index: Index, *, cache_limit: int | None, timeout: float = 600.0) -> None:
        self.index, self.limit, self.timeout = index, cache_limit or 0, timeout
        self.local, self.remote, self.shards = index.folder, index.remote, index.shards
        # Its shards would be evicted, and lost.
        if self.limit and Path(index.source).resolve() == self.local.resolve():
            raise InputError(
                f"cache_limit: needs a remote data set, but {self.local} holds the data set itself, not a cache"
            )
        if any(shard.zipped for shard in self.shards):
            from streaming.base.compression import decompress  # imports a package for each kind of compression

            self._decompress = decompress
        self._ends = list(accumulate(shard.samples for shard in self.shards))
        self._paths = [self.local / shard.raw.basename for shard in self.shards]
        self._known = set(self._paths)
        self._locks = self.local / LOCKS
        self._largest = max(shard.raw.bytes for shard in self.shards)
        self._room = self.limit - (self.local / INDEX).stat().st_size
        if self.limit and self._room < 4 * self._largest:
            raise InputError(
                f"cache_limit must be at least {4 * self._largest + self.limit - self._room} bytes, the size of the "
                f"index plus four times the size of the largest shard; got {self.limit}"
            )
        self._verified: set[int] = set()
        self._ahead: deque[int] = deque()
        self._threads: list[threading.Thread] = []
        if self.remote is not None:
            self._remove_abandoned()

    def __getitem__(self, sample_id: int) -> dict[str, Stored]:
        """Return column → value for a sample; see :meth:`Shard.read <d2v_composer.sources.mds.Shard.read>`."""
        shard_id = bisect_right(self._ends, sample_id)
        shard = self.shards[shard_id]
        sample_in_shard = sample_id - self._ends[shard_id] + shard.samples
        while True:
            self.prepare(shard_id)
            try:
                return shard.read(self._paths[shard_id], sample_in_shard)
            except FileNotFoundError:  # evicted, or deleted by another program, since it was seen
                continue
            except (ArithmeticError, LookupError, TypeError, ValueError) as error:
                raise ShardError(
                    f"{self.local}: shard {shard_id} is corrupt: its sample {sample_in_shard} cannot be read "
                    f"({reason(error)})"
                ) from error

    def prepare(self, shard_id: int) -> None:
        """Wait until a shard is present and verified; fetch the shard if it is missing."""
        deadline = time.monotonic() + self.timeout
        while not self._is_here(shard_id) and not self._fetch(shard_id, left := deadline - time.monotonic()):
            if left <= 0:
                raise ShardError(
                    f"{self._paths[shard_id]}: waited {self.timeout:.0f} s for space in the cache; raise cache_limit"
                )
            time.sleep(POLL_SECONDS)

    def fetch_ahead(self, shard_ids: Iterable[int]) -> None:
        """Start fetching shards in the background; errors are raised when the shards are read."""
        for shard_id in shard_ids:
            if shard_id not in self._ahead and not (shard_id in self._verified and self._paths[shard_id].exists()):
                self._ahead.append(shard_id)
        self._threads = [thread for thread in self._threads if thread.is_alive()]  # none is in a forked process
        with suppress(RuntimeError):  # no more threads can be started; the reader will fetch the shards
            while len(self._threads) < len(self._ahead) and len(self._threads) < self._num_ahead():
                # A daemon, so that a process can exit while it waits for a store.
                self._threads.append(threading.Thread(target=self._run_ahead, daemon=True))
                self._threads[-1].start()

    def _run_ahead(self) -> None:
        while self._ahead:
            try:
                shard_id = self._ahead.popleft()
                if not self._is_here(shard_id):
                    self._fetch(shard_id, self.timeout)
            except Exception as error:  # noqa: BLE001
                log.debug("%s", error)  # the reader will meet the same error, and raise it

    def _num_ahead(self) -> int:
        """Return the number of prefetch threads for this process."""
        worker = get_worker_info()
        processes = local_ranks() * (worker.num_workers if worker else 1)
        on_machine = max(MIN_AHEAD, min(os.cpu_count() or 1, MAX_AHEAD))
        if self.limit:  # at least half of it is for shards that are needed now
            return min(on_machine, self.limit // (2 * self._largest)) // processes
        return max(1, on_machine // processes)

    def _lock_of(self, path: Path) -> Path:
        """Return the path of a shard's lock, given the path of the shard or of a temporary file beside it."""
        return self._locks / PARTIAL.sub("", str(path.relative_to(self.local)))

    def _remove_abandoned(self, suffix: str = "") -> None:
        """Remove temporary files, whose names end with ``suffix``, of killed processes."""
        for left in find_partials(self._known):
            if left.name.endswith(suffix):
                with sole_user(self._lock_of(left)) as is_abandoned:
                    if is_abandoned:
                        left.unlink(missing_ok=True)

    def _is_here(self, shard_id: int) -> bool:
        """Return True if a shard can be read; verify each shard once in a process."""
        path = self._paths[shard_id]
        with suppress(FileNotFoundError):
            if shard_id not in self._verified and path.is_file():
                if (fault := self.shards[shard_id].raw.find_fault(path)) is None:
                    self._verified.add(shard_id)
                elif self.remote is None:
                    raise ShardError(fault)
            if shard_id in self._verified:
                path.stat()
                if self.limit:
                    with suppress(PermissionError):  # another user's
                        os.utime(path)
                return True
        return False

    def _fetch(self, shard_id: int, timeout: float) -> bool:
        """Fetch and verify a shard, with retries for ``timeout`` seconds.

        Returns:
            False if another thread or process is fetching the shard, or the cache has no room yet.
        """
        path, shard = self._paths[shard_id], self.shards[shard_id]
        stored = shard.zipped or shard.raw
        address = f"{self.remote or self.local}/{stored.basename}"
        if self.remote is None and (stored is shard.raw or not Path(address).exists()):
            raise ShardError(f"{path}: the shard is missing")

        def attempt() -> None:
            transfer(address, fetched, min(self.timeout, REQUEST_SECONDS))
            if shard.zipped:
                fetched.write_bytes(self._decompress(shard.compression, fetched.read_bytes()))
            if (fault := shard.raw.find_fault(fetched)) is not None:
                raise ValueError(f"the download does not match the index: {fault}")

        with writing(self.local), sole_user(self._lock_of(path)) as is_ours:
            if is_ours and path.is_file() and (fault := shard.raw.find_fault(path)) is not None:
                log.warning("%s; fetching it again", fault)
                path.unlink()
            if not is_ours and timeout > 0:  # after the timeout, fetch it, to raise the store's own error
                return False
            if is_ours and path.is_file():
                return True
            try:
                with partial_file(path, sync=False) as fetched:  # after a power failure, the shard is verified again
                    reservation = Path(f"{fetched}.{RESERVED}")  # removed with the partial file, if this fails
                    if self.limit:
                        self._reserve(reservation)
                    retry(attempt, address, timeout)
                reservation.unlink(missing_ok=True)
            except NoRoomError:
                return False
            except Exception as error:
                raise ShardError(f"{address}: the shard cannot be fetched to {self.local}: {reason(error)}") from error
        self._verified.add(shard_id)
        return True

    def _reserve(self, reservation: Path) -> None:
        """Make room for a shard by evicting the least recently used shards."""
        # Suppressed: another program may remove the cache.
        with suppress(FileNotFoundError), sole_user(self._locks / "room", self.timeout) as is_our_turn:
            fetching = sum(path.name.endswith(RESERVED) for path in find_partials(self._known))
            room = self._room - self._largest * (1 + fetching)
            if room >= 0 and is_our_turn:
                reservation.touch()
                files = ((path, path.stat()) for path in self._paths if path.is_file())
                for path, status in sorted(files, key=lambda file: file[1].st_mtime, reverse=True):
                    room -= status.st_size
                    if room < 0:
                        path.unlink()
                return
            self._remove_abandoned(RESERVED)
        raise NoRoomError
