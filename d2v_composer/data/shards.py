"""The folder that keeps the shards of a remote data set, used by one run at a time."""

import hashlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import xxhash
from filelock import FileLock
from numpy.typing import NDArray
from streaming import Stream
from streaming.base.compression import decompress
from streaming.base.format.base.reader import FileInfo, Reader
from streaming.base.shared import SharedArray, SharedScalar
from streaming.base.storage import CloudDownloader
from typing_extensions import override

from d2v_composer.system.errors import InputError, ShardError, reason
from d2v_composer.system.fetch import transfer
from d2v_composer.system.files import acquire, find_partials, partial_file
from d2v_composer.system.retry import retry

# MERGED FROM d2v_composer/data/shards.py: Fetch the shards of an MDS data set, and compare them with its index

# The fastest first; blake2b and those after it take longer than reading from a fast disk.
PREFERRED_HASHES = ("xxh3_64", "xxh3_128", "xxh128", "xxh64", "xxh32", "blake2b", "sha1", "md5", "sha256", "sha512")
# How long a store may send nothing, or almost nothing, before the request is repeated.
REQUEST_SECONDS = 20
READ_BYTES = 1 << 20

log = logging.getLogger(__name__)


class VerifiedStream(Stream):
    """An MDS data set, local or remote, whose shards are used only after their size and hash were verified.

    A shard that fails is deleted and fetched again if the data set is remote; in a local data set it is an error.
    Failed downloads are retried with growing pauses. A download gets its final name once it is complete and verified.

    Args:
        local: The data set, or the cache of a remote one.
        remote: The address in an object store, or ``None``.
        timeout: How long an unreachable store is retried, in seconds.
    """

    def __init__(self, *, local: str | Path, remote: str | None, timeout: float) -> None:
        super().__init__(local=str(local), remote=remote, download_timeout=min(timeout, REQUEST_SECONDS))
        self.timeout = timeout
        self._idle_downloaders: dict[int, list[CloudDownloader]] = {os.getpid(): [self._downloader]}

    @override
    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: NDArray[np.int64]) -> None:
        """Delete from the cache files of a wrong size and partial files of killed processes.

        The base class also deletes files of local data sets, and reports files that are not verified as usable; here
        no shard counts as usable until :class:`ShardCache` has it verified.

        Raises:
            ShardError: Such a file cannot be deleted.
        """
        if self.remote is None:
            return
        for path in find_partials({self._path(info) for shard in shards for info in _files(shard)}):
            _delete(path, "is left of a killed run")
        for info in (info for shard in shards for info in _files(shard)):
            path = self._path(info)
            if path.is_file() and path.stat().st_size != info.bytes:
                _delete_to_fetch_again(path, _wrong_size(path, info))

    def fetch_shard(self, shard: Reader, timeout: float | None = None, stop: threading.Event | None = None) -> None:
        """Make sure that a shard is here and verified.

        Args:
            shard: One of :meth:`get_shards`.
            timeout: How long an unreachable store is retried, in seconds; default: the stream's timeout.
            stop: Ends the retries when set.

        Raises:
            ShardError: The shard cannot be fetched.
        """
        timeout = self.timeout if timeout is None else timeout
        for raw, compressed in shard.file_pairs:
            if self._is_verified(raw):
                continue
            if compressed is None:
                self._fetch(raw, timeout, stop)
            else:
                if not self._is_verified(compressed):
                    self._fetch(compressed, timeout, stop)
                self._decompress(raw, compressed, shard.compression)

    def bytes_here(self, shard: Reader) -> int:
        """Return the bytes that a shard takes on the disk."""
        return sum(info.bytes for info in _files(shard) if self._path(info).is_file())

    def _path(self, info: FileInfo) -> Path:
        return Path(self.local, self.split, info.basename)

    def _address(self, info: FileInfo) -> str:
        return f"{self.remote.rstrip('/')}/{info.basename}" if self.remote else str(self._path(info))

    def _is_verified(self, info: FileInfo) -> bool:
        """Return True if a file is here as the index says; delete one that is not, if it can be fetched again."""
        path = self._path(info)
        if not path.is_file():
            return False
        fault = _fault(path, info)
        if fault is not None and self.remote is None:
            raise ShardError(fault)
        if fault is not None:
            _delete_to_fetch_again(path, fault)
        return fault is None

    def _fetch(self, info: FileInfo, timeout: float, stop: threading.Event | None) -> None:
        if self.remote is None:
            raise ShardError(f"{self._path(info)}: the shard is missing")
        address = self._address(info)

        def download() -> None:
            with self._partial(info) as partial:
                if address.startswith("s3://"):
                    transfer(address, partial, self.download_timeout, stop)
                else:
                    self._download_with_streaming(address, partial)

        try:
            retry(download, address, timeout, stop)
        except Exception as error:
            raise ShardError(f"{address}: the shard cannot be fetched: {reason(error)} (to {self.local})") from error

    def _download_with_streaming(self, address: str, path: Path) -> None:
        # Downloaders keep their connections. No two threads, and no two forked processes, may use one at a time.
        idle = self._idle_downloaders.setdefault(os.getpid(), [])
        try:
            downloader = idle.pop()
        except IndexError:
            downloader = CloudDownloader.get(self.remote)
        try:
            downloader.download(address, str(path), self.download_timeout)
        except Exception:
            downloader.clean_up()  # its connection may be broken
            raise
        finally:
            idle.append(downloader)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_idle_downloaders": {}}

    def _decompress(self, raw: FileInfo, compressed: FileInfo, algorithm: str | None) -> None:
        path = self._path(compressed)
        try:
            with self._partial(raw) as partial:
                partial.write_bytes(decompress(algorithm, path.read_bytes()))
        except Exception as error:
            raise ShardError(f"{path}: the shard cannot be decompressed: {reason(error)}") from error
        if not self.safe_keep_zip:
            path.unlink()

    @contextmanager
    def _partial(self, info: FileInfo) -> Iterator[Path]:
        """Return a path to write a file to, which becomes the file when the block ends, if its content is verified."""
        with partial_file(self._path(info), sync=False) as partial:  # a shard is verified again before its use
            yield partial
            if not partial.is_file():  # Streaming's downloader of gs:// ignores most errors if GCS_KEY is set
                raise RuntimeError("the store sent nothing")
            if (fault := _fault(partial, info)) is not None:
                raise ValueError(f"the download is not what the index says: {fault}")


def _delete_to_fetch_again(path: Path, fault: str) -> None:
    log.warning("%s: fetched again", fault)
    _delete(path, "is not as the index says")


def _delete(path: Path, why: str) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ShardError(f"{path}: {why}, and cannot be deleted ({error.strerror})") from error


def _files(shard: Reader) -> list[FileInfo]:
    """Return the files of a shard, raw and compressed."""
    return [info for pair in shard.file_pairs for info in pair if info is not None]


def _fault(path: Path, info: FileInfo) -> str | None:
    """Return how a file differs from what the index says, or ``None``."""
    if path.stat().st_size != info.bytes:
        return _wrong_size(path, info)
    algorithm = next((name for name in (*PREFERRED_HASHES, *info.hashes) if name in info.hashes), None)
    if algorithm is not None and _digest(path, algorithm) != info.hashes[algorithm]:
        return f"{path}: its content has changed ({algorithm})"
    return None


def _digest(path: Path, algorithm: str) -> str:
    # Streaming's get_hash needs the whole file in memory.
    state = getattr(xxhash, algorithm)() if algorithm.startswith("xxh") else hashlib.new(algorithm)
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(READ_BYTES):
            state.update(chunk)
    return state.hexdigest()


def _wrong_size(path: Path, info: FileInfo) -> str:
    return f"{path}: has {path.stat().st_size} bytes, the index says {info.bytes}"


# MERGED FROM d2v_composer/data/shards.py: The state of each shard on a machine, shared by all processes of a run.


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


# MERGED FROM d2v_composer/data/shards.py: Claim, fetch and evict the shards of a data set on this machine;

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


# MERGED FROM d2v_composer/data/shards.py: Fetch shards before they are needed.

TICK = 0.03
# How long the end of an epoch waits for each thread. One that hangs releases its shard later, as a daemon.
STOP_SECONDS = 5.0

log = logging.getLogger(__name__)


class Lookahead:
    """Fetch the shards that a process will need next, several at once, in the order in which it needs them.

    The threads are daemons, so that a process can end while one of them waits for a store.

    Args:
        cache: The shards' cache, which limits how many of them a machine fetches ahead.
        shard_of: Returns the shard of a sample.
        sample_ids: (N,) the samples that the process will read, in this order.
        num_samples: How many samples to look ahead of the reader.

    Attributes:
        num_read: How many of the samples were read; the reader counts them.
    """

    def __init__(
        self, cache: ShardCache, shard_of: Callable[[int], int], sample_ids: NDArray[np.int64], num_samples: int
    ) -> None:
        self.num_read = 0
        self._cache = cache
        self._shard_of = shard_of
        self._sample_ids = sample_ids
        self._num_samples = num_samples
        self._stop = threading.Event()
        self._walker = threading.Thread(target=self._walk, daemon=True)
        self._fetchers: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to fetch."""
        self._walker.start()

    def stop(self, wait: bool) -> None:
        """End fetching.

        Args:
            wait: Wait some seconds for the threads to end; not while the interpreter ends, when they never do.
        """
        self._stop.set()
        if wait:
            _join(self._walker)  # first: it starts the others
            for thread in self._fetchers:
                _join(thread)

    def _walk(self) -> None:
        for position, sample_id in enumerate(self._sample_ids):
            while position > self.num_read + self._num_samples and not self._stop.wait(TICK):
                pass
            if self._stop.is_set():
                return
            try:
                self._fetch_ahead(self._shard_of(int(sample_id)), position)
            except Exception as error:  # noqa: BLE001
                log.debug("%s", error)  # the reader will meet the same error, and raise it

    def _fetch_ahead(self, shard_id: int, position: int) -> None:
        """Start a thread that fetches a shard, once that is granted, unless its sample is read before."""
        while position >= self.num_read and not self._stop.is_set():
            claim = self._cache.claim(shard_id, ahead=True)
            if claim is Claim.FETCH:
                self._start_fetcher(shard_id)
            if claim is not Claim.WAIT:
                return
            self._stop.wait(TICK)

    def _start_fetcher(self, shard_id: int) -> None:
        thread = threading.Thread(target=self._fetch, args=(shard_id,), daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads can be started
            self._cache.release(shard_id)
            raise
        self._fetchers = [*(each for each in self._fetchers if each.is_alive()), thread]

    def _fetch(self, shard_id: int) -> None:
        try:
            self._cache.fetch(shard_id, self._stop)
        except Exception as error:  # noqa: BLE001
            log.debug("%s", error)


def _join(thread: threading.Thread) -> None:
    if thread is not threading.current_thread():  # garbage collection in one of the threads may end an epoch
        thread.join(STOP_SECONDS)


# The workers of a killed run notice within a second, and end.
LAST_USER_LEAVES = 15.0

_occupied: "weakref.WeakValueDictionary[Path, CacheFolder]" = weakref.WeakValueDictionary()


class CacheFolder:
    """A folder that no other process can occupy while this object exists.

    Args:
        path: The folder; it is made if it does not exist.

    Attributes:
        pid: The process that occupies it.

    Raises:
        InputError: Another process occupies the folder, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        try:
            descriptor = acquire(path / ".in_use", wait=LAST_USER_LEAVES)
        except OSError as error:
            raise InputError(f"{path}: shards cannot be kept there ({reason(error)})") from error
        if descriptor is None:
            raise InputError(f"{path}: another run keeps its shards there: give each run its own folder")
        self.pid = os.getpid()
        self._user: weakref.ref[ShardCache] | None = None
        weakref.finalize(self, os.close, descriptor)

    @classmethod
    def occupy(cls, path: Path) -> "CacheFolder":
        """Return the folder of this process: a new object, or that of another data set of this process.

        Raises:
            InputError: Another process occupies the folder, or it cannot be written.
        """
        folder = _occupied.get(path.resolve())
        if folder is None or folder.pid != os.getpid():  # a forked process inherits the object, not the right
            folder = _occupied[path.resolve()] = cls(path)
        return folder

    def give_to(self, cache: ShardCache) -> None:
        """Let this cache use the folder, instead of the cache of an older data set of this process.

        A notebook cell that is run again makes the new data set while the old one exists.

        Raises:
            InputError: Shards are still being fetched for the older one.
        """
        older = None if self._user is None else self._user()
        if older is not None:
            older.give_way(LAST_USER_LEAVES)
        self._user = weakref.ref(cache)
