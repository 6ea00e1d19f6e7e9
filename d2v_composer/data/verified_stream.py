"""The shards of an MDS data set, used only when they are what the index says: fetched, tried again, verified."""

import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from streaming import Stream
from streaming.base.compression import decompress
from streaming.base.format.base.reader import FileInfo, Reader
from streaming.base.storage import CloudDownloader
from typing_extensions import override

from d2v_composer.system.atomic_files import find_partials, partial_file
from d2v_composer.system.retry import reason, retry
from d2v_composer.system.s3_download import SCHEME, S3Downloader

__all__ = ["ShardError", "VerifiedStream"]

# The fastest first; from blake2b on a hash takes longer than a fast disk.
HASHES = ("xxh3_64", "xxh3_128", "xxh128", "xxh64", "xxh32", "blake2b", "sha1", "md5", "sha256", "sha512")
# Of one request: a store that hangs, or hardly sends anything for so long, is asked again.
REQUEST_PATIENCE = 20
READ_BYTES = 1 << 20

log = logging.getLogger(__name__)


class ShardError(RuntimeError):
    """A shard cannot be had, or is not what the index says."""


class DamagedError(ValueError):
    """A file is not what the index says."""


class VerifiedStream(Stream):
    """An MDS data set, local or remote, none of whose shards is used before its size and its hash were compared.

    What fails in the cache of a remote data set is deleted and fetched again; in a local one it is an error. A
    download that fails is tried again, with longer and longer pauses, and comes to its place only when it is whole.

    Args:
        local: The data set, or where the shards of a remote one are kept.
        remote: Its address in an object store, or ``None``.
        timeout: How long an unreachable store is tried again, in seconds.
    """

    def __init__(self, *, local: str | Path, remote: str | None, timeout: float) -> None:
        super().__init__(local=str(local), remote=remote, download_timeout=min(timeout, REQUEST_PATIENCE))
        self.timeout = timeout
        self._s3 = S3Downloader(self.download_timeout)
        if remote is not None and remote.startswith(SCHEME):
            self._s3.prepare()
        self._idle: tuple[int, list[CloudDownloader]] = (os.getpid(), [self._downloader])

    @override
    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: NDArray[np.int64]) -> None:
        """Let go of what is wrong at a glance: files of another size, and what a killed process left half-written.

        Raises:
            ShardError: Such a file cannot be deleted.
        """
        if self.remote is not None:
            for path in find_partials({self._path(info) for shard in shards for info in _files(shard)}):
                _delete(path, "is left of a killed run")
            for shard in shards:
                for info in _files(shard):
                    path = self._path(info)
                    if path.is_file() and path.stat().st_size != info.bytes:
                        self._drop(path, _wrong_size(path, info))
        # Not the base class's, which deletes what it holds to be inconsistent, in a local data set too.
        cache_usage_per_shard[:] = [self.bytes_here(shard) for shard in shards]

    def fetch_shard(self, shard: Reader, timeout: float | None = None, stop: threading.Event | None = None) -> None:
        """Make sure that a shard is here and whole.

        Args:
            shard: One of :meth:`get_shards`.
            timeout: Instead of the stream's own.
            stop: Ends waiting for the store, where it is set.

        Raises:
            ShardError: It cannot be had.
        """
        timeout = self.timeout if timeout is None else timeout
        for raw, compressed in shard.file_pairs:
            if self._is_whole(raw):
                continue
            if compressed is None:
                self._fetch(raw, timeout, stop)
            else:
                if not self._is_whole(compressed):
                    self._fetch(compressed, timeout, stop)
                self._decompress(raw, compressed, shard.compression)

    def bytes_here(self, shard: Reader) -> int:
        """What a shard takes of the disk."""
        return sum(info.bytes for info in _files(shard) if self._path(info).is_file())

    def _path(self, info: FileInfo) -> Path:
        return Path(self.local, self.split, info.basename)

    def _address(self, info: FileInfo) -> str:
        return "/".join([self.remote.rstrip("/"), info.basename]) if self.remote else str(self._path(info))

    def _is_whole(self, info: FileInfo) -> bool:
        """Whether a file is here as the index says; one that is not is deleted, where it can be fetched again."""
        path = self._path(info)
        if not path.is_file():
            return False
        fault = _fault(path, info)
        if fault is None:
            return True
        if self.remote is None:
            raise ShardError(fault)
        self._drop(path, fault)
        return False

    def _drop(self, path: Path, fault: str) -> None:
        log.warning("%s: fetched again", fault)
        _delete(path, "is not as the index says")

    def _fetch(self, info: FileInfo, timeout: float, stop: threading.Event | None) -> None:
        if self.remote is None:
            raise ShardError(f"{self._path(info)}: the shard is missing")

        def download() -> None:
            with self._partial(info) as partial:
                if self.remote is not None and self.remote.startswith(SCHEME):
                    self._s3.download(self._address(info), partial, stop)
                else:
                    with self._own_downloader() as downloader:
                        downloader.download(self._address(info), str(partial), self.download_timeout)

        try:
            retry(download, self._address(info), timeout, stop)
        except Exception as error:
            raise ShardError(
                f"{self._address(info)}: the shard cannot be fetched: {reason(error)} (to {self.local})"
            ) from error

    @contextmanager
    def _own_downloader(self) -> Iterator[CloudDownloader]:
        """One of Streaming's clients that no other thread uses now, with its connection; a failure costs it that."""
        process, idle = self._idle
        if process != os.getpid():  # forked: two processes on one connection get each other's answers
            process, idle = self._idle = os.getpid(), []
        try:
            downloader = idle.pop()
        except IndexError:
            downloader = CloudDownloader.get(self.remote)
        try:
            yield downloader
        except Exception:
            downloader.clean_up()
            raise
        finally:
            idle.append(downloader)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_idle": (0, [])}

    def _decompress(self, raw: FileInfo, compressed: FileInfo, algorithm: str | None) -> None:
        try:
            with self._partial(raw) as partial:
                partial.write_bytes(decompress(algorithm, self._path(compressed).read_bytes()))
        except Exception as error:
            raise ShardError(f"{self._path(compressed)}: the shard cannot be decompressed: {reason(error)}") from error
        if not self.safe_keep_zip:
            self._path(compressed).unlink()

    @contextmanager
    def _partial(self, info: FileInfo) -> Iterator[Path]:
        """A path for a file's content, which comes to its place when the block ends, if it is as the index says."""
        with partial_file(self._path(info), sync=False) as partial:  # a shard is verified again before its use
            yield partial
            if not partial.is_file():  # Streaming's downloader of gs:// with GCS_KEY passes over most errors
                raise RuntimeError("the store sent nothing")
            if (fault := _fault(partial, info)) is not None:
                raise DamagedError(f"what came is not what the index says: {fault}")


def _delete(path: Path, why: str) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ShardError(f"{path}: {why}, and cannot be deleted ({error.strerror})") from error


def _files(shard: Reader) -> list[FileInfo]:
    """A shard's files as they are, and compressed, where there are such."""
    return [info for pair in shard.file_pairs for info in pair if info is not None]


def _fault(path: Path, info: FileInfo) -> str | None:
    """What about a file is not as the index says, if anything."""
    if path.stat().st_size != info.bytes:
        return _wrong_size(path, info)
    algorithm = next((name for name in (*HASHES, *info.hashes) if name in info.hashes), None)
    if algorithm is not None and _digest(path, algorithm) != info.hashes[algorithm]:
        return f"{path}: its content has changed ({algorithm})"
    return None


def _digest(path: Path, algorithm: str) -> str:
    # Not Streaming's get_hash, which wants the whole file in memory.
    state = getattr(xxhash, algorithm)() if algorithm.startswith("xxh") else hashlib.new(algorithm)
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(READ_BYTES):
            state.update(chunk)
    return state.hexdigest()


def _wrong_size(path: Path, info: FileInfo) -> str:
    return f"{path}: has {path.stat().st_size} bytes, the index says {info.bytes}"
