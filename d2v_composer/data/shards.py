"""Read the samples of an MDS data set, local or in an object store, from verified shards.

All state is in the file system. A shard is here once its final file name exists: it is fetched to a partial file,
compared with the index, and renamed. Each process verifies a file once, before it first reads it, whoever put it there.
So any number of processes and runs may share a cache: locks only prevent that two fetch the same shard, and keep the
cache below its limit. The kernel releases the locks of a killed process.
"""

import fcntl
import hashlib
import json
import logging
import os
import struct
import threading
import time
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import xxhash
from streaming.base.compression import decompress
from streaming.base.format.base.reader import FileInfo
from streaming.base.format.mds import MDSReader
from streaming.base.util import bytes_to_int
from streaming.base.world import World

from d2v_composer.data.index import INDEX, fetch_index
from d2v_composer.system.errors import ShardError, reading, reason, writing
from d2v_composer.system.fetch import transfer
from d2v_composer.system.files import NO_LOCKS, PARTIAL, find_partials, partial_file
from d2v_composer.system.retry import retry

# The fastest first; blake2b and those after it take longer than reading from a fast disk.
PREFERRED_HASHES = ("xxh3_64", "xxh3_128", "xxh128", "xxh64", "xxh32", "blake2b", "sha1", "md5", "sha256", "sha512")
# How long a store may send nothing, or almost nothing, before the request is repeated.
REQUEST_SECONDS = 20
READ_BYTES = 1 << 20
# How often a thread that waits for another one's shard looks again.
POLL_SECONDS = 0.02
# A shard's time of last use has this resolution.
TOUCH_SECONDS = 1.0
# Shards that a machine fetches ahead at a time. One connection to an object store delivers about what one core decodes.
FEWEST_AHEAD, MOST_AHEAD = 4, 64
# The file whose bytes are the locks: one for each shard, and one for the room in the cache.
LOCKS = ".locks"
# struct flock of 64-bit Linux: type, whence, start, length, process.
FLOCK = "hhqqi4x"

T = TypeVar("T")

log = logging.getLogger(__name__)


class Shards:
    """The samples of an MDS data set, by number.

    Args:
        local: The data set, or the cache of a remote one. Processes and runs may share a cache.
        remote: The address in an object store, or ``None``.
        cache_limit: The most that ``local`` may hold of a remote data set, in bytes or as '100gb'; default: all of it.
        timeout: How long an unreachable store is retried, in seconds.

    Attributes:
        readers: Streaming's reader for each shard.
        limit: The cache limit in bytes; 0: none.

    Raises:
        InputError: The index cannot be read.
        ValueError: ``cache_limit`` is too small, or set for a local data set.
    """

    def __init__(
        self,
        *,
        local: str | Path,
        remote: str | None = None,
        cache_limit: int | str | None = None,
        timeout: float = 600.0,
    ) -> None:
        self.local, self.remote, self.timeout = Path(local), remote and remote.rstrip("/"), timeout
        self.limit = bytes_to_int(cache_limit or 0)
        if remote is not None and Path(remote).resolve() == self.local.resolve():  # evicted shards would be lost
            raise ValueError(f"remote must be another folder than local {local}")
        if self.limit and remote is None:
            raise ValueError("cache_limit is for a remote data set; omit it for a local one")
        index = self.local / INDEX
        if remote is not None and not index.exists():
            fetch_index(remote, self.local, timeout)
        with reading(index):
            contents = index.read_bytes()
            self.readers = [MDSReader.from_json(str(local), "", shard) for shard in json.loads(contents)["shards"]]
            for reader in self.readers:
                reader.validate(allow_unsafe_types=False)
        self._ends = list(accumulate(reader.samples for reader in self.readers))
        self._sizes = [reader.get_max_size() for reader in self.readers]
        self._index_bytes = len(contents)
        if 0 < self.limit < (smallest := self._index_bytes + 4 * max(self._sizes)):
            raise ValueError(
                f"cache_limit must be at least {smallest} bytes, the index and four shards, got {self.limit}"
            )
        self._paths = [self.local / reader.raw_data.basename for reader in self.readers]
        self._shard_at = {path: shard_id for shard_id, path in enumerate(self._paths)}
        self._verified: set[int] = set()
        self._touched: dict[int, float] = {}
        self._ahead: Lookahead | None = None
        if remote is not None:
            self._remove_partials()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, sample_id: int) -> dict[str, Any]:
        """Return a sample as it is stored, by column.

        Raises:
            IndexError: There is no such sample.
            ShardError: Its shard cannot be fetched, or is corrupt.
        """
        shard_id = self.shard_of(sample_id)
        sample_in_shard = sample_id - self._ends[shard_id] + self.readers[shard_id].samples
        return self._with_shard(shard_id, lambda: self._read(shard_id, sample_in_shard))

    def shard_of(self, sample_id: int) -> int:
        """Return the number of a sample's shard."""
        return bisect_right(self._ends, sample_id)

    def prepare(self, shard_id: int) -> None:
        """Fetch and verify a shard, or wait for the thread that does.

        Raises:
            ShardError: The shard cannot be fetched, or is corrupt.
        """
        self._with_shard(shard_id, lambda: None)

    def fetch_ahead(self, shard_ids: Iterable[int]) -> None:
        """Start to fetch and verify shards that will be needed. An error is raised when they are needed."""
        if self._ahead is None or self._ahead.pid != os.getpid():  # threads do not survive a fork
            self._ahead = Lookahead(weakref.WeakMethod(self._prepare_ahead), self._num_ahead())
        for shard_id in shard_ids:
            if shard_id not in self._verified or not self._paths[shard_id].exists():
                self._ahead.add(shard_id)

    def _with_shard(self, shard_id: int, use: Callable[[], T]) -> T:
        """Call a function while a shard is here and verified."""
        deadline = None
        while True:
            with suppress(FileNotFoundError):  # evicted, or deleted by another program, since it was seen
                if self._is_here(shard_id):
                    return use()
                deadline = deadline or time.monotonic() + self.timeout
                with self._claim(shard_id) as is_ours:
                    if is_ours:
                        self._provide(shard_id, deadline - time.monotonic())
                        return use()  # while the claim prevents that the shard is evicted
            time.sleep(POLL_SECONDS)

    def _prepare_ahead(self, shard_id: int) -> None:
        if not self._is_here(shard_id):
            with self._claim(shard_id) as is_ours:
                if is_ours:
                    self._provide(shard_id, self.timeout)

    def _num_ahead(self) -> int:
        """Return the number of threads with which this process fetches ahead: its part of the machine's."""
        processes = World.detect().workers_per_node
        on_machine = max(FEWEST_AHEAD, min(os.cpu_count() or 1, MOST_AHEAD))
        if self.limit:  # at least half of it is for shards that are needed now
            return min(on_machine, self.limit // (2 * max(self._sizes))) // processes
        return max(1, on_machine // processes)

    def _is_here(self, shard_id: int) -> bool:
        """Return True if a shard can be read; verify a file that this process has not read yet."""
        path = self._paths[shard_id]
        if not path.is_file():
            return False
        if shard_id not in self._verified:
            if (fault := _find_fault(path, self.readers[shard_id].raw_data)) is not None:
                if self.remote is None:
                    raise ShardError(fault)
                return False
            self._verified.add(shard_id)
        if self.limit and (now := time.monotonic()) - self._touched.get(shard_id, -TOUCH_SECONDS) >= TOUCH_SECONDS:
            self._touched[shard_id] = now
            with suppress(PermissionError):  # another user's
                os.utime(path)
        return True

    def _read(self, shard_id: int, sample_in_shard: int) -> dict[str, Any]:
        try:
            return self.readers[shard_id][sample_in_shard]
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ShardError(
                f"{self.local}: shard {shard_id} is corrupt: its sample {sample_in_shard} cannot be read "
                f"({reason(error)})"
            ) from error

    def _provide(self, shard_id: int, timeout: float) -> None:
        """Fetch and verify a shard that this thread has claimed, unless it is here by now."""
        path, reader = self._paths[shard_id], self.readers[shard_id]
        raw, compressed = reader.raw_data, reader.zip_data
        stored = compressed or raw
        address = f"{self.remote}/{stored.basename}" if self.remote else str(self.local / stored.basename)
        if self.remote is None and (compressed is None or not Path(address).is_file()):
            raise ShardError(f"{path}: the shard is missing")
        try:
            if path.is_file() and (fault := _find_fault(path, raw)) is not None:
                log.warning("%s: fetched again", fault)
                path.unlink()
            if not path.is_file():
                retry(partial(self._fetch, path, raw, compressed, reader.compression), address, timeout)
        except Exception as error:
            raise ShardError(f"{address}: the shard cannot be fetched: {reason(error)} (to {self.local})") from error
        self._verified.add(shard_id)

    def _fetch(self, path: Path, raw: FileInfo, compressed: FileInfo | None, algorithm: str | None) -> None:
        with partial_file(path, sync=False) as fetched:  # after a power failure, the shard is verified again
            if compressed is None:
                self._download(raw, fetched)
            elif self.remote is None:
                fetched.write_bytes(decompress(algorithm, (self.local / compressed.basename).read_bytes()))
            else:
                archive = Path(f"{fetched}.tmp")  # removed with the partial file
                self._download(compressed, archive)
                fetched.write_bytes(decompress(algorithm, archive.read_bytes()))
                archive.unlink()
            _check_fetched(fetched, raw)

    def _download(self, info: FileInfo, path: Path) -> None:
        transfer(f"{self.remote}/{info.basename}", path, min(self.timeout, REQUEST_SECONDS))
        if not path.is_file():  # Streaming's downloader of gs:// ignores most errors if GCS_KEY is set
            raise RuntimeError("the store sent nothing")
        _check_fetched(path, info)

    @contextmanager
    def _claim(self, shard_id: int) -> Iterator[bool]:
        """Lock a shard, with room for it in the cache, until the block ends.

        Yields:
            False if another thread has the lock, or shards that are being fetched take the room.
        """
        if self.remote is None:
            yield True
            return
        with ExitStack() as claim:
            with self._lock(len(self.readers)) if self.limit else nullcontext(True) as is_our_turn:
                is_ours = is_our_turn and claim.enter_context(self._lock(shard_id)) and self._make_room(shard_id)
            yield is_ours

    def _make_room(self, shard_id: int) -> bool:
        """Evict the shards that were used longest ago; return False if others, being fetched, take the room."""
        if not self.limit:
            return True
        in_use = self._locked_shards() | {shard_id}
        files = sorted(file for file in self._files() if file[1] not in in_use)
        num_bytes = self._index_bytes + sum(self._sizes[each] for each in in_use) + sum(size for *_, size in files)
        for _, each, size in files:
            if num_bytes <= self.limit:
                break
            try:
                self._paths[each].unlink(missing_ok=True)
            except OSError as error:
                raise ShardError(f"{self.local}: shard {each} cannot be evicted: {reason(error)}") from error
            num_bytes -= size
        return num_bytes <= self.limit

    def _files(self) -> Iterator[tuple[float, int, int]]:
        """Yield the last use of each shard in the cache, its number and its bytes."""
        for folder in {path.parent for path in self._paths}:
            with suppress(FileNotFoundError), os.scandir(folder) as entries:
                for entry in entries:
                    shard_id = self._shard_at.get(folder / entry.name)
                    if shard_id is not None and entry.is_file():
                        with suppress(FileNotFoundError):
                            yield entry.stat().st_mtime, shard_id, entry.stat().st_size

    @contextmanager
    def _lock(self, byte: int) -> Iterator[bool]:
        """Lock a byte of the file of locks until the block ends; yield False if it is locked elsewhere.

        The lock belongs to the open file, not to the process: threads exclude each other, too.
        """
        path = self.local / LOCKS
        with writing(path):
            self.local.mkdir(parents=True, exist_ok=True)  # it may be removed during the run
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            yield _lock_byte(descriptor, fcntl.F_WRLCK, byte)
        finally:
            _lock_byte(descriptor, fcntl.F_UNLCK, byte)  # a process forked meanwhile has the descriptor, too
            os.close(descriptor)

    def _locked_shards(self) -> set[int]:
        """Return the shards that are being fetched, or read while they might be evicted."""
        locked: set[int] = set()
        ranges = [(0, len(self.readers))]
        with suppress(OSError), (self.local / LOCKS).open("rb") as file:  # without locks, none is known
            while ranges:
                begin, end = ranges.pop()
                question = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, begin, end - begin, 0)
                kind, _, start, length, _ = struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_OFD_GETLK, question))
                if kind != fcntl.F_UNLCK:  # one lock within the range, not always its first
                    stop = start + length
                    locked.update(range(max(start, begin), min(stop, end)))
                    ranges += [each for each in ((begin, start), (stop, end)) if each[0] < each[1]]
        return locked

    def _remove_partials(self) -> None:
        """Remove the partial files of killed processes."""
        for left in find_partials(self._shard_at.keys()):
            with self._lock(self._shard_at[left.with_name(PARTIAL.sub("", left.name))]) as is_abandoned:
                if is_abandoned:
                    left.unlink(missing_ok=True)


class Lookahead:
    """Fetch shards before they are needed, in threads of this process that end when there is nothing to fetch.

    The threads are daemons, so that a process can exit while one of them waits for a store.

    Args:
        fetch: Fetches a shard.
        num_threads: The most threads.
    """

    def __init__(self, fetch: weakref.WeakMethod[Callable[[int], None]], num_threads: int) -> None:
        self.pid = os.getpid()
        self._fetch = fetch
        self._num_threads = num_threads
        self._wanted: set[int] = set()
        self._queue: deque[int] = deque()
        self._threads: list[threading.Thread] = []

    def add(self, shard_id: int) -> None:
        """Fetch a shard after those that were added before."""
        if shard_id in self._wanted:
            return
        self._wanted.add(shard_id)
        self._queue.append(shard_id)
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if len(self._threads) < self._num_threads:
            with suppress(RuntimeError):  # no more threads can be started; the reader will fetch the shard
                thread = threading.Thread(target=self._run, daemon=True)
                thread.start()
                self._threads.append(thread)

    def _run(self) -> None:
        while self._queue and (fetch := self._fetch()) is not None:  # the data set still exists
            with suppress(IndexError):  # another thread took the last one
                self._fetch_one(fetch, self._queue.popleft())
            del fetch

    def _fetch_one(self, fetch: Callable[[int], None], shard_id: int) -> None:
        try:
            fetch(shard_id)
        except Exception as error:  # noqa: BLE001
            log.debug("%s", error)  # the reader will meet the same error, and raise it
        finally:
            self._wanted.discard(shard_id)


def _lock_byte(descriptor: int, kind: int, byte: int) -> bool:
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack(FLOCK, kind, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        return error.errno in NO_LOCKS
    return True


def _check_fetched(path: Path, info: FileInfo) -> None:
    if (fault := _find_fault(path, info)) is not None:
        raise ValueError(f"the download is not what the index says: {fault}")


def _find_fault(path: Path, info: FileInfo) -> str | None:
    """Return how a file differs from what the index says, or ``None``."""
    if (size := path.stat().st_size) != info.bytes:
        return f"{path}: has {size} bytes, the index says {info.bytes}"
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
