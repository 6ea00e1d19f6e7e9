"""Fetch files from web servers and object stores."""

import functools
import hashlib
import os
import re
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any

import requests
import torch
from filelock import FileLock

from d2v_composer.system.addresses import STUDENT_FILE, Address, file_name, hide_secrets, identity
from d2v_composer.system.errors import InputError, reason
from d2v_composer.system.files import partial_file
from d2v_composer.system.progress import progress_bar
from d2v_composer.system.retry import CONNECT_SECONDS, LASTING_ATTEMPTS, is_missing, retry

# Timeout of an answer and of each part of a file.
READ_SECONDS = 30.0
# Time for retries of a run's own file.
RETRY_SECONDS = 600.0
LARGEST_FILE = 32 << 30
# Bytes a second. A link may be slow, and shared by many requests; a slower download is broken off.
LEAST_RATE = 1024
# A model on the Hugging Face hub; Streaming reads data sets, hf://datasets/….
HUB = re.compile(r"hf://(?!datasets/)([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?")


def cache_folder() -> Path:
    """Return the folder of fetched files, below torch.hub's folder (``TORCH_HOME``)."""
    return Path(torch.hub.get_dir()) / "d2v_composer"


def is_remote(address: str | Path) -> bool:
    """Return True if an address is on a web server or in an object store.

    Raises:
        InputError: The address is malformed.
    """
    try:
        return Address.parse(str(address)).is_remote
    except ValueError as error:
        raise InputError(f"{address}: {error}") from error


def fetch(address: str | Path) -> Path:
    """Return the local path of a file; fetch a remote file unless it is cached.

    Args:
        address: A path, https://…, or an object store's address that mosaicml-streaming reads: s3://, gs://, oci://,
            azure://, …. Remote files are cached in :func:`cache_folder`. A presigned address with a new signature is
            the same file; signatures, logins and queries are not written to the disk. Or hf://ORG/NAME, a student on
            the Hugging Face hub; hf://ORG/NAME@REVISION/FILE for another revision and file.

    Raises:
        InputError: The file does not exist, or cannot be fetched.
    """
    if not is_remote(address):
        if (missing := find_missing_file(str(address))) is not None:
            raise InputError(f"{address}: {missing}")
        return Path(address)
    address = str(address)
    if on_hub := HUB.fullmatch(address):
        repository, revision, name = on_hub.groups()
        return fetch_from_hub(repository, [name or STUDENT_FILE], revision)
    name = f"{hashlib.sha256(identity(address).encode()).hexdigest()[:16]}-{file_name(address)[-100:]}"
    path = cache_folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # other processes of this machine wait and find the file
        if not path.exists():
            try:
                _download(address, path, READ_SECONDS, lasting_attempts=1)
            except Exception as error:
                raise InputError(f"{address}: cannot be fetched ({reason(error)})") from error
    return path


def fetch_from_hub(repository: str, names: Sequence[str], revision: str | None = None) -> Path:
    """Return the first of these files found in the Hugging Face hub's cache, else on the hub.

    The hub's own variables hold: HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN.

    Raises:
        InputError: There is none, or the hub is not reachable.
    """
    from huggingface_hub import hf_hub_download

    problem = ""
    for from_cache, name in product((True, False), names):
        try:
            return Path(hf_hub_download(repository, name, revision=revision, local_files_only=from_cache))
        except (OSError, ValueError) as error:
            problem = reason(error)[:200]
    found = f"no {' or '.join(names)} in {repository} on the Hugging Face hub or in its cache"
    raise InputError(f"{found}: {problem}")


def find_missing_file(address: str) -> str | None:
    """Return an error message if there is no file at a local path; ``None`` for a file or a remote address."""
    if is_remote(address) or os.path.isfile(address):
        return None
    return "is a folder, not a file" if os.path.isdir(address) else "no such file"


def download_existing(address: str, path: Path, retry_timeout: float = RETRY_SECONDS) -> bool:
    """Fetch a file that may be missing, and retry while its store is unreachable.

    Args:
        address: The file's, see :func:`fetch`.
        path: Exists, or is replaced, only once the file is complete.
        retry_timeout: Time for retries, in seconds.

    Returns:
        Whether there is such a file.

    Raises:
        Exception: The client's, if the file cannot be read.
    """
    try:
        _download(address, path, retry_timeout)
    except Exception as error:
        if is_missing(error):
            return False
        raise
    return True


def _download(address: str, path: Path, retry_timeout: float, lasting_attempts: int = LASTING_ATTEMPTS) -> None:
    def attempt() -> None:
        with partial_file(path) as partial:
            transfer(address, partial, READ_SECONDS)

    retry(attempt, address, retry_timeout, lasting_attempts=lasting_attempts)


def transfer(address: str, path: Path, timeout: float) -> None:
    """Fetch a file without retries; a failure raises the client's error and leaves a partial file.

    Args:
        address: The file's, see :func:`fetch`.
        path: The local file.
        timeout: Seconds until an answer, and between parts; a steady download may take longer.

    Raises:
        FileNotFoundError: The file does not exist in S3.
        ConnectionError: The connection broke.
        TimeoutError: The rate was below :data:`LEAST_RATE`.
        Exception: Other errors of the store's client.
    """
    if address.startswith(("https://", "http://")):
        _transfer_from_web(address, path, timeout)
    elif address.startswith("s3://"):
        _transfer_from_s3(address, path, timeout)
    else:
        from streaming.base.storage import CloudDownloader  # takes seconds

        CloudDownloader.direct_download(address, str(path), timeout)


def _transfer_from_web(address: str, path: Path, timeout: float) -> None:
    try:  # not torch.hub, which keeps a truncated file
        answer = requests.get(address, stream=True, timeout=(CONNECT_SECONDS, timeout))
    except requests.exceptions.InvalidURL:  # whose text quotes a part of the login
        raise ValueError("not an address: percent-encode the special characters of a login") from None
    with answer as response:
        response.raise_for_status()
        length = response.headers.get("Content-Length")
        bar = progress_bar(desc=hide_secrets(address), unit="B", total=length and int(length), unit_scale=True)
        with path.open("wb") as file, bar:
            for chunk in response.iter_content(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))


def _transfer_from_s3(address: str, path: Path, timeout: float) -> None:
    """Fetch a file in one request.

    Streaming's downloader has no limit for the time of a read, and sends two or more requests for a file, at half the
    speed.
    """
    bucket, _, key = address.removeprefix("s3://").partition("/")
    request = {"Bucket": bucket, "Key": key}
    if bucket in os.environ.get("MOSAICML_STREAMING_AWS_REQUESTER_PAYS", "").split(","):
        request["RequestPayer"] = "requester"
    client = s3_client(timeout, os.environ.get("S3_ENDPOINT_URL"), os.getpid())
    try:
        response = client.get_object(**request)
    except (client.exceptions.NoSuchKey, client.exceptions.NoSuchBucket) as error:
        raise FileNotFoundError(f"{address}: not found ({error})") from error
    with closing(response["Body"]) as body, path.open("wb") as file:
        since, before = time.monotonic(), 0
        # botocore's own reads block until they are full.
        while chunk := body._raw_stream.read1(1 << 20):
            file.write(chunk)
            if (seconds := time.monotonic() - since) > timeout:
                if (came := file.tell() - before) < LEAST_RATE * seconds:
                    raise TimeoutError(f"too slow: {came} bytes in {seconds:.0f} s")
                since, before = time.monotonic(), file.tell()
        if file.tell() < (length := response.get("ContentLength", 0)):
            raise ConnectionError(f"truncated after {file.tell()} of {length} bytes")


@functools.cache
def s3_client(timeout: float, endpoint: str | None, pid: int) -> Any:
    """Return an S3 client; a forked process must not use its parent's client."""
    from boto3.session import Session
    from botocore.config import Config

    config = Config(
        connect_timeout=min(timeout, CONNECT_SECONDS),
        read_timeout=timeout,
        retries={"total_max_attempts": 1, "mode": "standard"},
        max_pool_connections=128,
        response_checksum_validation="when_required",  # the caller verifies
    )
    return Session().client("s3", endpoint_url=endpoint, config=config)
