"""Fetch files from web servers, object stores and the Hugging Face hub; list and write files in object stores."""

import errno
import functools
import hashlib
import logging
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import requests
import torch
from filelock import FileLock
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from typing_extensions import Self

from d2v_composer.system.addresses import STUDENT_FILE, Address, canonical_address, file_name, hide_secrets
from d2v_composer.system.errors import FULL, InputError, RunError, reading, reason
from d2v_composer.system.files import check_out_file, move, partial_file, write_atomically
from d2v_composer.system.processes import local_rank
from d2v_composer.system.progress import progress_bar

if TYPE_CHECKING:
    from composer.utils import ObjectStore

# Timeout of an answer and of each part of a file.
READ_SECONDS = 30.0
# Time for retries of a run's own file.
RETRY_SECONDS = 600.0
LARGEST_FILE = 32 << 30
# Bytes a second. A link may be slow, and shared by many requests; a slower download is broken off.
LEAST_RATE = 1024
# A command that needs a file again within these seconds uses its copy without asking whether the file has changed.
ASK_SECONDS = 60.0
# A model or a data set on the Hugging Face hub: kind, repository, revision and file or folder.
HUB = re.compile(r"hf://(datasets/|(?!datasets/))([^/@]+/[^/@]+)(?:@(refs/[^/]+/[^/]+|[^/]+))?(?:/(.+))?")
COMMIT = re.compile("[0-9a-f]{40}")
# What some stores put around an ETag in one answer, and not in another.
QUOTES = 'W/"'

# Timeout of a connection: a reachable host answers immediately. Clients' defaults are a minute and several attempts.
CONNECT_SECONDS = 10.0
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 8.0
# A store that is starting may briefly answer that a file is missing or access denied.
LASTING_ATTEMPTS = 4
LASTING_STATUS = (401, 403, 404)
LASTING = (FileNotFoundError, NotImplementedError, ValueError)
# Errors of botocore, which may not be installed.
LASTING_NAMES = ("NoCredentialsError", "PartialCredentialsError")
# Faults of the local disk: full, denied, or something else in the way.
LOCAL = (
    *FULL,
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP),
)

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

_asked: dict[Path, float] = {}
"""Cached file → the value of ``time.monotonic()`` when this process last asked the server if the file has changed."""

_keeps_inodes: dict[int, bool] = {}
"""Device → whether its files keep their inode numbers; False if the ID of the file system is 0."""


class UnchangedError(ValueError):
    """A file still has the known version."""


class File(NamedTuple):
    """A file's description, by which changes to the file are detected."""

    path: str
    """Path relative to the folder or address that was listed."""
    size: int = 0
    """Size in bytes; 0 if unknown."""
    version: str = ""
    """Time of a local file's last change, in ns; in S3, the ETag; on the hub, the commit; '' if unknown."""
    number: int = 0
    """Inode number of a local file; 0 if the file is remote, or its file system does not keep inode numbers."""

    @classmethod
    def of(cls, path: str, place: str | Path | int, status: os.stat_result | None = None) -> Self:
        """Describe the local file at ``place``, a path or a descriptor; ``status`` is its ``os.stat``, if known."""
        status = status or os.stat(place)
        if status.st_dev not in _keeps_inodes:  # a list of millions of files asks once
            _keeps_inodes[status.st_dev] = not hasattr(os, "statvfs") or os.statvfs(place).f_fsid != 0
        return cls(path, status.st_size, str(status.st_mtime_ns), status.st_ino if _keeps_inodes[status.st_dev] else 0)


def cache_folder() -> Path:
    """Return this package's cache folder, which is in torch.hub's folder."""
    return Path(torch.hub.get_dir()) / "d2v_composer"


def is_remote(address: str | Path) -> bool:
    """Return True if an address has a scheme, such as ``https``, ``s3`` or ``hf``."""
    try:
        return Address.parse(str(address)).is_remote
    except ValueError as error:
        raise InputError(f"{address}: {error}") from error


def fetch(address: str | Path, version: str = "", *, again: bool = False) -> Path:
    """Return the local path of a file; fetch a remote file unless it is cached and has not changed.

    If the file cannot be fetched, or its server reports no version, a cached file is used, with a warning.

    Args:
        address: A local path; an address on a web server, or in an object store that mosaicml-streaming reads; or, on
            the Hugging Face hub, hf://ORG/NAME[@REVISION][/FILE] for a file of a model, by default
            student.safetensors, or hf://datasets/ORG/NAME[@REVISION]/FILE for a file of a data set.
        version: The only version to fetch; default: the newest. Ignored for files on the hub.
        again: Replace a damaged copy in the cache.

    Raises:
        InputError: The file is missing, or cannot be fetched and is not cached.
    """
    if not is_remote(address):
        if (missing := find_missing_file(str(address))) is not None:
            raise InputError(f"{address}: {missing}")
        return Path(address)
    address = str(address)
    if on_hub := HUB.fullmatch(address):
        kind, repository, revision, name = on_hub.groups()
        options = {"repo_type": "dataset"} if kind else {}
        return fetch_from_hub(repository, [name or STUDENT_FILE], revision, again=again, **options)
    key = hashlib.sha256(f"{canonical_address(address)}{version}".encode()).hexdigest()[:16]
    name = f"{key}-{file_name(address)[-100:]}"
    path = cache_folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    is_asked = time.monotonic() - _asked.get(path, -ASK_SECONDS) < ASK_SECONDS
    is_asked |= local_rank() > 0 or version != ""  # by the node's first rank, or when it was listed
    with FileLock(f"{path}.lock"):  # other processes of this machine wait and find the file
        try:
            if again or not (is_asked and path.exists()):
                _renew(address, path, version, again)
        except Exception as error:
            shown, problem = hide_secrets(address), reason(error)
            if not path.exists():
                raise InputError(f"{shown} cannot be fetched ({problem})") from error
            since = time.strftime("%Y-%m-%d", time.localtime(path.stat().st_mtime))
            advice = f"using the cached copy, from {since}; delete {path} to fetch the file again"
            log.warning("%s was not fetched (%s); %s", shown, problem, advice)
        if not is_asked:
            _asked[path] = time.monotonic()
    return path


def _renew(address: str, path: Path, version: str, again: bool) -> None:
    """Fetch a file unless its current version is cached."""
    version_file = path.with_name(f"{path.name}.version")
    cached_version = version_file.read_text() if version_file.exists() and path.exists() and not again else None
    if cached_version == "":
        raise ValueError("its server does not say whether the file has changed")

    def attempt() -> None:
        with partial_file(path) as partial:
            fetched = transfer(address, partial, READ_SECONDS, cached_version)
            if version and version.strip(QUOTES) != fetched.strip(QUOTES):
                raise ValueError("the file has changed since it was listed; run the same command again")
            version_file.unlink(missing_ok=True)  # a file of unknown version is fetched again
        write_atomically(version_file, fetched)

    with suppress(UnchangedError):
        retry(attempt, address, READ_SECONDS if cached_version is None else 0, lasting_attempts=1)


def fetch_from_hub(
    repository: str, names: Sequence[str], revision: str | None, *, again: bool = False, **options: Any
) -> Path:
    """Fetch the first file in ``names`` that a repository on the Hugging Face hub has, and return its local path.

    If the hub does not give access to the repository, the copy in the local cache is used, with a warning.
    """
    from huggingface_hub import HfApi, hf_hub_download

    # A commit does not change, and of others the node's first rank has asked.
    is_known, problem = COMMIT.fullmatch(revision or "") is not None or local_rank() > 0, ""
    from_caches = (True, False) if is_known and not again else (False,)
    try:
        if not is_known:
            HfApi().repo_info(repository, revision=revision, timeout=CONNECT_SECONDS, **options)
    except (OSError, ValueError) as error:
        problem, from_caches = reason(error)[:200], (True,)  # its client would try, and warn, for half a minute
        log.warning("%s: not available on the Hugging Face hub (%s); using the local cache", repository, problem)
    options |= {"force_download": True} if again else {}
    for from_cache, name in product(from_caches, names):
        try:
            return Path(hf_hub_download(repository, name, revision=revision, local_files_only=from_cache, **options))
        except (OSError, ValueError) as error:
            problem = problem or reason(error)[:200]
    raise InputError(
        f"no {' or '.join(names)} in {repository} on the Hugging Face hub or in the local cache: {problem}"
    )


def find_missing_file(address: str) -> str | None:
    """Return an error message if ``address`` is a local path without a file; otherwise ``None``."""
    if is_remote(address) or os.path.isfile(address):
        return None
    return "a folder, not a file" if os.path.isdir(address) else "no such file"


def download_existing(address: str, path: Path) -> bool:
    """Fetch a file that may be missing; retry for at most :data:`RETRY_SECONDS`.

    Returns:
        False if the file is missing.
    """

    def attempt() -> None:
        with partial_file(path) as partial:
            transfer(address, partial, READ_SECONDS)

    try:
        retry(attempt, address, RETRY_SECONDS)
    except Exception as error:
        if is_missing(error):
            return False
        raise
    return True


def exists(address: str) -> bool:
    """Return True if a file, local or in a store, exists."""
    if not is_remote(address):
        return os.path.isfile(address)
    folder, _, name = address.rpartition("/")
    return name in (list_etags(folder, name) if address.startswith("s3://") else names_in(folder))


def names_in(folder: str | Path) -> list[str]:
    """Return the names in a local folder, or the paths of all files below a folder in a store.

    The list is empty if the folder is missing.
    """
    if is_remote(folder):
        return [file.path for file in list_store(str(folder))]
    with reading(folder):
        return os.listdir(folder) if os.path.lexists(folder) else []


def check_outputs(*outputs: str, overwrite: bool) -> None:
    """Check that output files, local or in a store, are new or may be replaced."""
    for output in outputs:
        if not is_remote(output):
            check_out_file(Path(output), overwrite=overwrite)
        elif not overwrite and exists(output):
            raise InputError(f"{output} already exists; choose another file, or append --overwrite")


def put(path: Path, address: str, denial_passes: bool = False) -> None:
    """Move a file to its final path, or upload the file to a store with retries for at most :data:`RETRY_SECONDS`."""
    if not is_remote(address):
        move(path, Path(address))
        return
    try:
        store, key = open_store(address)
        retry(lambda: store.upload_object(key, str(path)), address, RETRY_SECONDS, denial_passes=denial_passes)
    except Exception as error:
        raise RunError(f"{address} cannot be written ({reason(error)})") from error


def transfer(address: str, path: Path, timeout: float, known: str | None = None) -> str:
    """Fetch a file without retries; a failure may leave a partial file at ``path``.

    Returns:
        The file's version, such as its ETag; '' if unknown.
    """
    if address.startswith(("https://", "http://")):
        return _transfer_from_web(address, path, timeout, known)
    if address.startswith("s3://"):
        return _transfer_from_s3(address, path, timeout, known)
    from streaming.base.storage import CloudDownloader  # takes seconds

    path.unlink(missing_ok=True)  # the downloader would keep a part of the file
    # Its uploader and Composer take azure://CONTAINER/KEY, its downloader azure://ACCOUNT/CONTAINER/KEY.
    CloudDownloader.direct_download(re.sub(r"^azure://(?=[^./]+/)", "azure://-/", address), str(path), timeout)
    return ""


def _transfer_from_web(address: str, path: Path, timeout: float, known: str | None) -> str:
    try:  # not torch.hub, which keeps a truncated file; not HEAD, which a presigned address does not allow
        answer = requests.get(address, stream=True, timeout=(CONNECT_SECONDS, timeout))
    except requests.exceptions.InvalidURL:  # its text quotes a part of the login
        raise ValueError("not a valid address; in a login, special characters must be percent-encoded") from None
    with answer as response:
        response.raise_for_status()
        tag, modified, length = (response.headers.get(name, "") for name in ("ETag", "Last-Modified", "Content-Length"))
        if (version := tag or (modified and f"{modified} {length}")) == known:
            raise UnchangedError
        bar = progress_bar(desc=hide_secrets(address), unit="B", total=int(length or 0) or None, unit_scale=True)
        with path.open("wb") as file, bar:
            for chunk in response.iter_content(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
    return version


def _transfer_from_s3(address: str, path: Path, timeout: float, known: str | None) -> str:
    # Streaming's downloader has no limit for the time of a read, and sends at least two requests for a file.
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
        if (version := response.get("ETag", "")) == known:
            raise UnchangedError
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
    return version


def list_store(folder: str, name: str = "") -> list[File]:
    """List the files below a folder in a store, sorted."""
    try:
        return sorted(retry(lambda: _list(folder, name), folder, READ_SECONDS, lasting_attempts=1))
    except Exception as error:
        raise InputError(f"{folder} cannot be listed ({reason(error)})") from error


def list_etags(folder: str, name: str = "") -> dict[str, str]:
    """Return name → ETag of the objects in a folder in S3, without subfolders; empty if the folder is not in S3."""
    if not folder.startswith("s3://"):
        return {}
    try:
        files = retry(lambda: _list_s3(folder, name, "/"), folder, RETRY_SECONDS)
    except Exception as error:
        raise RunError(f"{folder} cannot be listed: {reason(error)}") from error
    return {file.path: file.version for file in files}


def _list_s3(folder: str, name: str, delimiter: str = "") -> list[File]:
    bucket, _, key = f"{folder.removeprefix('s3://')}/".partition("/")
    client, files = s3_client(READ_SECONDS, os.environ.get("S3_ENDPOINT_URL"), os.getpid()), list[File]()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key + name, Delimiter=delimiter):
        if "IsTruncated" not in page:  # an empty answer, which is not the answer that there is nothing
            raise ConnectionError("the store's answer is empty")
        for entry in page.get("Contents", ()):
            if not entry["Key"].endswith("/"):  # a console's empty folder
                files.append(File(entry["Key"].removeprefix(key), entry["Size"], entry["ETag"]))
    return files


def open_store(address: str) -> "tuple[ObjectStore, str]":
    """Return a client for the object store that an address names, and the object's key in the store."""
    from composer.utils import maybe_create_object_store_from_uri, parse_uri

    store = maybe_create_object_store_from_uri(address)
    assert store is not None  # a run's store is one of Composer's
    return store, parse_uri(address)[2]


def list_names(address: str) -> list[str]:
    """Return the relative paths of the files below a folder in a store; errors of the store's client pass unchanged."""
    return [file.path for file in _list(address)]


def _list(folder: str, name: str = "") -> list[File]:
    if folder.startswith("s3://"):
        return _list_s3(folder, name)
    store, prefix = open_store(f"{folder}/")  # lists names alone
    return [File(key.removeprefix(prefix)) for key in store.list_objects(prefix + name) if not key.endswith("/")]


@functools.cache
def s3_client(timeout: float, endpoint: str | None, pid: int) -> Any:
    """Return an S3 client for this process, whose id must be given: a forked process cannot use its parent's client."""
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


def retry(
    attempt: Callable[[], ResultT],
    what: str,
    timeout: float,
    lasting_attempts: int = LASTING_ATTEMPTS,
    denial_passes: bool = False,
) -> ResultT:
    """Call ``attempt`` until it succeeds, and return its result.

    A local error (see :func:`is_local`) is raised immediately. Otherwise, the last error is raised after ``timeout``,
    or as soon as ``lasting_attempts`` errors were lasting (see :func:`is_lasting`).
    """
    start = time.monotonic()
    pause, num_lasting = FIRST_PAUSE, 0
    dice = random.Random()  # not the global generator, which training uses
    while True:
        try:
            return attempt()
        except Exception as error:
            num_lasting += is_lasting(error) and not (denial_passes and _status(error))
            left = timeout - (time.monotonic() - start)
            if is_local(error) or num_lasting >= lasting_attempts or left <= 0:
                raise
            level = logging.INFO if is_missing(error) else logging.WARNING  # a missing file is no surprise
            log.log(level, "%s: %s; retrying for %.0f s", hide_secrets(what), reason(error), left)
            time.sleep(min(pause * dice.uniform(0.5, 1), left))
        pause = min(2 * pause, LONGEST_PAUSE)


def is_local(error: BaseException) -> bool:
    """Return True if an error is local: an error of the disk or the path, or a failed import."""
    return isinstance(error, ImportError) or (isinstance(error, OSError) and error.errno in LOCAL)


def is_lasting(error: BaseException) -> bool:
    """Return True if a retry after this error is unlikely to help."""
    known = isinstance(error, LASTING) or type(error).__name__ in LASTING_NAMES
    return not _is_unreachable(error) and (known or _status(error) in LASTING_STATUS)


def is_missing(error: BaseException) -> bool:
    """Return True if an error means that a file does not exist."""
    return not _is_unreachable(error) and (isinstance(error, FileNotFoundError) or _status(error) == 404)


def _is_unreachable(error: BaseException) -> bool:
    # If Hugging Face is unreachable, its client reports that its cache lacks the file: a FileNotFoundError.
    return isinstance(error, LocalEntryNotFoundError) and not isinstance(error.__cause__, OfflineModeIsEnabled)


def _status(error: BaseException) -> int | None:
    """Return the HTTP status in an error from botocore, google-cloud, azure, oci or requests."""
    if type(error).__name__ == "S3UploadFailedError" and error.__context__ is not None:  # boto3's, of another error
        error = error.__context__
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    codes = [getattr(response, "status_code", None), *(getattr(error, name, None) for name in ("status_code", "code"))]
    return next((value for value in [*codes, getattr(error, "status", None)] if isinstance(value, int)), None)
