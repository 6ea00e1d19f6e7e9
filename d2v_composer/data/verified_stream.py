"""Fetch the shards of an MDS data set, and compare them with its index before they are used."""

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
from d2v_composer.system.errors import ShardError
from d2v_composer.system.retry import reason, retry
from d2v_composer.system.s3_download import S3_SCHEME, S3Downloader

__all__ = ["VerifiedStream"]

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
        self._s3 = S3Downloader(self.download_timeout) if remote is not None and remote.startswith(S3_SCHEME) else None
        if self._s3 is not None:
            self._s3.prepare()
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
                if self._s3 is not None:
                    self._s3.download(address, partial, stop)
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
