"""Fetch files from web servers and object stores."""

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import requests
import torch
from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import BotoCoreError
from filelock import FileLock
from urllib3 import BaseHTTPResponse

from d2v_composer.system import retry
from d2v_composer.system.addresses import Address, file_name, hide_secrets, identity, is_address
from d2v_composer.system.command_line import progress_bar
from d2v_composer.system.errors import InputError, reason
from d2v_composer.system.files import find_partials, partial_file

# MERGED FROM d2v_composer/system/fetch.py: Download files from S3, one request each, with a minimum rate.

S3_SCHEME = "s3://"
# Bytes a second. A link may be slow, and shared by many requests; below this rate, the download is stopped.
LEAST_RATE = 1024
READ_BYTES = 1 << 20
MOST_CONNECTIONS = 128


class S3Downloader:
    """Downloads files, in one request each, from ``S3_ENDPOINT_URL`` or AWS.

    Streaming's downloader has no limit for the time of a read, and sends two or more requests for a file, at half the
    speed. One object serves all threads of a process, and processes forked from it.

    Args:
        retry timeout: Timeout of a connection and of an answer, in seconds, and the period in which a body must average
            :data:`LEAST_RATE`. A body above this rate may take any time.
        attempts: Number of requests, for callers that do not retry.
    """

    def __init__(self, retry_timeout: float, attempts: int = 1) -> None:
        self.retry_timeout = retry_timeout
        self.attempts = attempts
        self._client: Any = None
        self._user: int | None = None  # process ID of the client's first use

    def download(self, address: str, path: Path, stop: threading.Event | None = None) -> None:
        """Download a file, without retries; a failure leaves a partial file.

        Args:
            address: s3://BUCKET/KEY.
            path: The local file.
            stop: If set, end the download with an error.

        Raises:
            FileNotFoundError: The file does not exist.
            ConnectionError: The connection broke.
            TimeoutError: The rate was too low.
            InterruptedError: ``stop`` was set.
            Exception: Other errors of botocore and urllib3.
        """
        bucket, _, key = address.removeprefix(S3_SCHEME).partition("/")
        request = {"Bucket": bucket, "Key": key}
        if bucket in os.environ.get("MOSAICML_STREAMING_AWS_REQUESTER_PAYS", "").split(","):
            request["RequestPayer"] = "requester"
        client = self._connect()
        try:
            response = client.get_object(**request)
        except (client.exceptions.NoSuchKey, client.exceptions.NoSuchBucket) as error:
            raise FileNotFoundError(f"{address}: not found ({error})") from error
        # botocore's own reads block until they are full.
        with closing(response["Body"]) as body, path.open("wb") as file:
            for chunk in _steady(body._raw_stream, self.retry_timeout, stop or threading.Event()):
                file.write(chunk)
            if file.tell() < (length := response.get("ContentLength", 0)):
                raise ConnectionError(f"truncated after {file.tell()} of {length} bytes")

    def prepare(self) -> None:
        """Create the client before processes are forked, which saves each of them 50 ms or more."""
        with suppress(BotoCoreError, ValueError):  # the first download will report the error
            self._client = self._make_client()

    def _connect(self) -> Any:
        # A forked process may use its parent's client only if that has no connections yet.
        if self._client is None or self._user not in (None, os.getpid()):
            self._client = self._make_client()
        self._user = os.getpid()
        return self._client

    def _make_client(self) -> Any:
        config = Config(
            connect_timeout=min(self.retry_timeout, retry.CONNECT_SECONDS),
            read_timeout=self.retry_timeout,
            retries={"total_max_attempts": self.attempts, "mode": "standard"},
            max_pool_connections=MOST_CONNECTIONS,
            response_checksum_validation="when_required",  # the caller verifies
        )
        return Session().client("s3", endpoint_url=os.environ.get("S3_ENDPOINT_URL"), config=config)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_client": None, "_user": None}


def _steady(body: BaseHTTPResponse, retry_timeout: float, stop: threading.Event) -> Iterator[bytes]:
    """Yield the chunks of a body as they arrive; raise an error if the rate is too low."""
    since, came = time.monotonic(), 0
    while chunk := body.read1(READ_BYTES):
        yield chunk
        came += len(chunk)
        seconds = time.monotonic() - since
        if seconds > retry_timeout:
            if came < LEAST_RATE * seconds:
                raise TimeoutError(f"too slow: {came} bytes in {seconds:.0f} s")
            since, came = time.monotonic(), 0
        if stop.is_set():
            raise InterruptedError("the download was stopped")


# The largest data2vec 2.0 checkpoint: 600 million weights with decoder, moving average and optimizer, 15 GB.
LARGEST_FILE = 32 << 30
# Timeout of an answer and of each part of a file.
READ_SECONDS, S3_ATTEMPTS = 30.0, 3
# Of one attempt at a run's own file, and of all.
ATTEMPT_SECONDS, RETRY_SECONDS = 60.0, 600.0
LONGEST_NAME = 100


def cache_folder() -> Path:
    """Return the folder of fetched files, below torch.hub's folder (``TORCH_HOME``)."""
    return Path(torch.hub.get_dir()) / "d2v_composer"


def is_remote(address: str | Path) -> bool:
    """Return whether an address is a web server's or an object store's.

    Raises:
        InputError: The address is malformed.
    """
    try:
        return Address.parse(str(address)).is_remote
    except ValueError as error:
        raise InputError(f"{address}: {error}") from error


def fetch(address: str | Path) -> Path:
    """Return a local path of a file; fetch a remote one unless it is cached.

    Args:
        address: A path, https://…, or an object store's address that mosaicml-streaming reads: s3://, gs://, oci://,
            azure://, hf://, …. Remote files are cached in :func:`cache_folder`. A presigned address with a new
            signature is the same file; signatures, logins and queries are not written to the disk.

    Raises:
        InputError: The file does not exist, or cannot be fetched.
    """
    if not is_remote(address):
        path = Path(address)
        if (missing := find_missing_file(str(path))) is not None:
            raise InputError(f"{address}: {missing}")
        if path.stat().st_size > LARGEST_FILE:
            raise InputError(f"{address}: has {path.stat().st_size} bytes, at most {LARGEST_FILE} are read")
        return path
    address = str(address)
    path = cache_folder() / cached_name(address)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # other processes of this machine wait and find the file
        if not path.exists():
            for left in find_partials([path]):
                left.unlink()
            download(address, path)
    return path


def find_missing_file(address: str) -> str | None:
    """Return why there is no file to read at a local path; ``None`` if there is one, or for a remote address."""
    if is_address(address) or os.path.isfile(address):
        return None
    return "is a folder, not a file" if os.path.isdir(address) else "no such file"


def cached_name(address: str) -> str:
    """Return a remote file's name in the cache: a hash of its address, and the end of its name."""
    file = identity(address)
    return f"{hashlib.sha256(file.encode()).hexdigest()[:16]}-{file_name(file)[-LONGEST_NAME:]}"


def download(address: str, path: Path, timeout: float = 600) -> None:
    """Fetch ``address`` to ``path``, which exists only once it is complete.

    Raises:
        InputError: It cannot be fetched.
    """
    try:
        with partial_file(path) as partial:
            transfer(address, partial, timeout)
    except Exception as error:
        raise InputError(f"{hide_secrets(address)}: cannot be fetched ({reason(error)})") from error


def download_existing(address: str, path: Path, retry_timeout: float = RETRY_SECONDS) -> bool:
    """Fetch a file that may be missing, and retry while its store is unreachable.

    Args:
        address: As for :func:`download`.
        path: Exists, or is replaced, only once the file is complete.
        retry timeout: Time for retries, in seconds.

    Returns:
        Whether there is such a file.

    Raises:
        Exception: The client's, if the file cannot be read.
    """

    def download_once() -> None:
        with partial_file(path) as partial:
            transfer(address, partial, ATTEMPT_SECONDS)

    try:
        retry.retry(download_once, address, retry_timeout)
    except Exception as error:
        if retry.is_missing(error):
            return False
        raise
    return True


def transfer(address: str, path: Path, timeout: float) -> None:
    """Fetch ``address`` to ``path`` without retries; a failure raises the client's error and leaves a partial file."""
    if address.startswith(("https://", "http://")):
        _download_from_web(address, path, timeout)
    elif address.startswith(S3_SCHEME):
        S3Downloader(min(timeout, READ_SECONDS), S3_ATTEMPTS).download(address, path)
    else:
        from streaming.base.storage import CloudDownloader  # takes seconds

        CloudDownloader.direct_download(address, str(path), timeout)


def _download_from_web(address: str, path: Path, timeout: float) -> None:
    # Not torch.hub, which keeps a truncated file.
    limits = (retry.CONNECT_SECONDS, min(timeout, READ_SECONDS))
    with requests.get(address, stream=True, timeout=limits) as response:
        response.raise_for_status()
        length = response.headers.get("Content-Length")
        size = int(length) if length else None
        bar = progress_bar(desc=hide_secrets(address), unit="B", total=size, unit_scale=True)
        with path.open("wb") as file, bar:
            for chunk in response.iter_content(1 << 20):
                if file.tell() > LARGEST_FILE:
                    raise ValueError(f"larger than {LARGEST_FILE} bytes")
                file.write(chunk)
                bar.update(len(chunk))
