"""Read the index of an MDS folder (MosaicML Streaming's format), and check it before it is used."""

import hashlib
import json
import logging
import platform
import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from d2v_composer.system.addresses import hide_secrets
from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import transfer
from d2v_composer.system.files import existing_folder, partial_file
from d2v_composer.system.retry import is_lasting, is_local, reason, retry

INDEX = "index.json"
# Timeout of one attempt to fetch it.
INDEX_SECONDS = 60.0
SUMMARY = "conversion.json"
# Encodings of a column of images: files as bytes, files that Streaming would decode, raw pixels.
IMAGE_ENCODINGS = ("bytes", "jpeg", "png", "pil")

log = logging.getLogger(__name__)


def fetch_index(remote: str, local: Path, retry_timeout: float = 0.0) -> None:
    """Fetch the index of a remote data set into its cache.

    If the store is unreachable, use an index that is here, with a warning; shards are verified by it.

    Args:
        remote: The data set's address.
        local: The cache.
        retry_timeout: How long an unreachable store is retried if no index is here, in seconds.

    Raises:
        InputError: The index is missing or corrupt, the store is unreachable, or ``local`` is another data set's cache.
    """
    index, address = local / INDEX, f"{remote.rstrip('/')}/{INDEX}"
    here = index.read_bytes() if index.exists() and _is_json(index) else None
    with partial_file(index) as fetched:
        try:
            timeout = retry_timeout if here is None else 0.0
            retry(partial(transfer, address, fetched, INDEX_SECONDS), address, timeout, lasting_attempts=1)
        except Exception as error:
            message = f"{hide_secrets(address)}: cannot be fetched ({reason(error)})"
            if here is None or is_lasting(error) or is_local(error):
                raise InputError(message) from error
            log.warning("%s; the index in %s is used", message, local)
            fetched.write_bytes(here)
        if not _is_json(fetched):
            raise InputError(f"{address}: corrupt, or not an MDS index")
        if here not in (None, fetched.read_bytes()):
            raise InputError(f"{local}: holds shards of another data set than {remote}: give another folder for these")


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


class RoomNeeded(NamedTuple):
    """The disk space that a node needs."""

    disk: tuple[str, int]
    """The machine, and the disk's number there."""
    local: str
    bytes: int
    """The size of the shards that are still to be fetched."""
    free: int
    """The free bytes of the disk."""


def room_needed(
    shards: list[dict[str, Any]], local: Path, cache_limit: int | None = None, share: float = 1.0
) -> RoomNeeded:
    """Estimate the size of the shards that a node has yet to fetch.

    Args:
        shards: The shards as :func:`read_index` returns them.
        local: The node's cache.
        cache_limit: The most bytes that the cache may hold; ``None`` or 0: no limit.
        share: The part of the data set that the node reads.
    """
    files = [shard["raw_data"] for shard in shards]
    held = sum(file["bytes"] for file in files if _size(local / file["basename"]) == file["bytes"])
    to_come = max(0, int(share * sum(file["bytes"] for file in files)) - held)
    if to_come:  # a compressed file is deleted once it is decompressed
        to_come += max(shard["zip_data"]["bytes"] if shard["zip_data"] else 0 for shard in shards)
    if cache_limit:  # which includes shards of an earlier run
        to_come = min(to_come, max(0, cache_limit - held))
    existing = existing_folder(local)
    disk = (platform.node(), existing.stat().st_dev)
    return RoomNeeded(disk, str(local), to_come, shutil.disk_usage(existing).free)


def check_room(needs: Iterable[RoomNeeded]) -> None:
    """Check that the shards of remote data sets fit on the disks.

    Args:
        needs: One for each node. Nodes of one machine may keep their shards on the same disk.

    Raises:
        InputError: A disk has too little free space.
    """
    for _, same_disk in groupby(sorted(needs), key=lambda need: need.disk):
        each = list(same_disk)
        needed, free = sum(need.bytes for need in each), each[0].free
        if needed > free:
            raise InputError(
                f"{', '.join(need.local for need in each)}: {needed / 1e9:.1f} GB of shards are still to come, "
                f"{free / 1e9:.1f} GB of the disk are free: make room, or set a cache limit"
            )


def find_missing_index(folder: Path) -> str | None:
    """Return an error message if a folder has no index, else ``None``."""
    if (folder / INDEX).is_file():
        return None
    return f"no {INDEX}: {'not an MDS data set' if folder.is_dir() else 'no such folder'}"


def read_index(
    folder: Path, *, columns: tuple[str, ...], option: str | None = None, shards_may_be_missing: bool = False
) -> list[dict[str, Any]]:
    """Read and check the shards that an index lists.

    Args:
        folder: The folder of the ``index.json``.
        columns: The columns that the samples must have.
        option: The setting that chooses other columns, for the error.
        shards_may_be_missing: They are fetched later; otherwise each must be there in its full size.

    Raises:
        InputError: The index is missing or corrupt, lists no samples or lacks a column, or a shard is missing or has
            another size.
    """
    index = folder / INDEX
    if (missing := find_missing_index(folder)) is not None:
        raise InputError(f"{folder}: {missing}")
    try:
        shards = json.loads(index.read_bytes())["shards"]
        for shard in shards:
            _check_shard(folder, shard, columns, option)
            if not shards_may_be_missing:
                _check_files(folder, shard)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index}: corrupt, or not an MDS index ({type(error).__name__}: {error})") from error
    if not shards:
        raise InputError(f"{folder}: the data set is empty: its {INDEX} lists no samples")
    return shards


def read_image_index(
    folder: Path,
    column: str,
    *,
    option: str,
    source: str | None = None,
    other_columns: tuple[str, ...] = (),
    shards_may_be_missing: bool = False,
) -> list[dict[str, Any]]:
    """Read and check the shards of a data set of images, as :func:`read_index` does.

    Args:
        folder: The folder of the ``index.json``.
        column: The column of images.
        option: The setting that chooses the columns, for the error.
        source: The data set's name, for the error; default: the folder.
        other_columns: Further columns that the samples must have.
        shards_may_be_missing: They are fetched later.

    Raises:
        InputError: As :func:`read_index`, or the column cannot hold images.
    """
    columns = (column, *other_columns)
    shards = read_index(folder, columns=columns, option=option, shards_may_be_missing=shards_may_be_missing)
    encodings = {shard["column_encodings"][shard["column_names"].index(column)] for shard in shards}
    if not encodings <= set(IMAGE_ENCODINGS):
        raise InputError(
            f"{source or folder}: its column {column!r} is {', '.join(sorted(encodings))}; "
            f"expected one of {', '.join(IMAGE_ENCODINGS)}"
        )
    return shards


def _check_shard(folder: Path, shard: dict[str, Any], columns: tuple[str, ...], option: str | None) -> None:
    for file in _files(shard):
        name = Path(file["basename"])
        if name.is_absolute() or ".." in name.parts:
            raise InputError(f"{folder}: its {INDEX} names a file outside the folder: {name}")
    if "pkl" in shard["column_encodings"]:
        raise InputError(f"{folder}: has a column of pickles, which may run code: it is not read")
    # Each sample takes at least the four bytes of its offset; a larger number would take memory for no samples.
    num_bytes, num_samples = shard["raw_data"]["bytes"], shard["samples"]
    if not 0 < 4 * num_samples <= num_bytes:
        raise InputError(f"{folder}: its {INDEX} claims {num_samples} samples in {num_bytes} bytes")
    if missing := [column for column in columns if column not in shard["column_names"]]:
        hint = f"; choose with {option}" if option else ""
        names = ", ".join(shard["column_names"])
        raise InputError(f"{folder}: no column {missing[0]!r}; the data set has: {names}{hint}")


def _check_files(folder: Path, shard: dict[str, Any]) -> None:
    found = {folder / file["basename"]: (_size(folder / file["basename"]), file["bytes"]) for file in _files(shard)}
    if all(size is None for size, _ in found.values()):
        raise InputError(f"{next(iter(found))}: the shard is missing")
    for path, (size, expected) in found.items():
        if size not in (None, expected):
            raise InputError(f"{path}: the shard has {size} bytes, the index says {expected}")


def _files(shard: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the files of a shard, raw and compressed."""
    return [shard[kind] for kind in ("raw_data", "zip_data") if shard[kind] is not None]


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def keep_encoded(readers: Sequence[Any], column: str) -> None:
    """Make MDSReaders return the files of an image column as bytes, where Streaming would decode them with Pillow.

    We decode only the rows that a crop needs, and only with decoders that we allow.
    """
    for reader in readers:
        at = reader.column_names.index(column)
        if reader.column_encodings[at] in ("jpeg", "png"):
            reader.column_encodings[at] = "bytes"


def describe_data(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Describe the content of a data set; its place and the names of its files do not matter."""
    contents = [(shard["samples"], shard["raw_data"]["bytes"], shard["raw_data"].get("hashes")) for shard in shards]
    return {
        "sha256": hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest(),
        "samples": sum(shard["samples"] for shard in shards),
        "shards": len(shards),
    }
