"""The index of an MDS folder (MosaicML Streaming's format), checked before anything relies on it."""

import hashlib
import json
import platform
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from streaming.base.format.base.reader import Reader
from streaming.base.format.mds import MDSReader

from d2v_composer.system.atomic_files import existing_folder
from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import download

__all__ = [
    "SUMMARY",
    "RoomNeeded",
    "check_image_column",
    "check_room",
    "describe_data",
    "fetch_index",
    "keep_encoded",
    "read_index",
    "room_needed",
]

INDEX = "index.json"
# Encodings of a column that holds images: files as bytes, files that Streaming would open, raw pixels.
IMAGE_ENCODINGS = ("bytes", "jpeg", "png", "pil")


def fetch_index(remote: str, local: Path) -> None:
    """Bring the index of a remote data set to ``local``.

    Raises:
        InputError: There is none, the store cannot be reached, or ``local`` is another data set's cache.
    """
    local.mkdir(parents=True, exist_ok=True)
    index, fetched = local / INDEX, local / f".{INDEX}.fetched"
    address = f"{remote.rstrip('/')}/{INDEX}"
    download(address, fetched, timeout=60)
    if not _is_json(fetched):
        fetched.unlink()
        raise InputError(f"{address}: damaged, or not an MDS index")
    if index.exists() and _is_json(index) and index.read_bytes() != fetched.read_bytes():
        fetched.unlink()
        raise InputError(f"{local}: holds shards of another data set than {remote}: give another folder for these")
    fetched.replace(index)


class RoomNeeded(NamedTuple):
    """What a node needs of a disk."""

    disk: tuple[str, int]
    """The machine, and the disk's number there."""
    local: str
    bytes: int
    """Of shards that are still to come."""
    free: int
    """Bytes of the disk."""


def room_needed(
    shards: list[dict[str, Any]], local: Path, cache_limit: int | None, read: NDArray[np.int64] | None = None
) -> RoomNeeded:
    """Add up the shards that a node has yet to fetch.

    Args:
        shards: As :func:`read_index` gives them.
        local: The node's cache.
        cache_limit: What it may hold, in bytes; ``None`` or 0: all.
        read: The places in the index of the shards that the node reads, as ``shards_of_node`` finds them; default all.
    """
    files = [shard["raw_data"] for shard in shards]
    here = {i: file["bytes"] for i, file in enumerate(files) if _size(local / file["basename"]) == file["bytes"]}
    is_read = set(range(len(files)) if read is None else read.tolist())
    to_come = sum(files[i]["bytes"] for i in is_read - here.keys())
    if to_come:  # a compressed file goes once it is unpacked
        to_come += max(shard["zip_data"]["bytes"] if shard["zip_data"] else 0 for shard in shards)
    if cache_limit:  # which holds for shards of an earlier run, too
        to_come = min(to_come, max(0, cache_limit - sum(here.values())))
    existing = existing_folder(local)
    disk = (platform.node(), existing.stat().st_dev)
    return RoomNeeded(disk, str(local), to_come, shutil.disk_usage(existing).free)


def check_room(needs: Iterable[RoomNeeded]) -> None:
    """Make sure that the shards of remote data sets find room.

    Args:
        needs: Of all nodes, each once: those of one machine may keep their shards on one disk.

    Raises:
        InputError: A disk has less free than is still to come.
    """
    of_disk: dict[tuple[str, int], list[RoomNeeded]] = {}
    for need in needs:
        of_disk.setdefault(need.disk, []).append(need)
    for each in of_disk.values():
        needed, free = sum(need.bytes for need in each), each[0].free
        if needed > free:
            raise InputError(
                f"{', '.join(need.local for need in each)}: {needed / 1e9:.1f} GB of shards are still to come, "
                f"{free / 1e9:.1f} GB of the disk are free: make room, or set a cache limit"
            )


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def _files(shard: dict[str, Any]) -> list[dict[str, Any]]:
    """A shard's file as it is, and compressed, where there is one."""
    return [shard[kind] for kind in ("raw_data", "zip_data") if shard[kind] is not None]


def read_index(
    folder: Path, *, columns: tuple[str, ...], option: str | None = None, shards_may_be_missing: bool = False
) -> list[dict[str, Any]]:
    """The shards that an index lists.

    Args:
        folder: Holds ``index.json``.
        columns: What the samples must have.
        option: The setting that chooses other columns, for the error.
        shards_may_be_missing: They are fetched later; otherwise each must be there in its full size.

    Raises:
        InputError: There is no index, it is damaged, it lists no samples, lacks a column, or a shard is not whole.
    """
    index = folder / INDEX
    if not index.is_file():
        raise InputError(f"{folder}: no {INDEX}: {'not an MDS data set' if folder.is_dir() else 'no such folder'}")
    try:
        shards = json.loads(index.read_bytes())["shards"]
        for shard in shards:
            _check_shard(folder, shard)
            _check_columns(folder, shard, columns, option)
            if not shards_may_be_missing:
                _check_files(folder, shard)
        num_samples = sum(shard["samples"] for shard in shards)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index}: damaged, or not an MDS index ({type(error).__name__}: {error})") from error
    if not num_samples:
        raise InputError(f"{folder}: the data set is empty: its {INDEX} lists no samples")
    return shards


def check_image_column(shards: list[dict[str, Any]], column: str, source: str) -> None:
    """Make sure that a column can hold images.

    Args:
        shards: As :func:`read_index` gives them.
        column: Which.
        source: Named in the error.

    Raises:
        InputError: Its encoding is another one.
    """
    encodings = {dict(zip(shard["column_names"], shard["column_encodings"], strict=True))[column] for shard in shards}
    if not encodings <= set(IMAGE_ENCODINGS):
        raise InputError(
            f"{source}: its column {column!r} is {', '.join(sorted(encodings))}; "
            f"expected one of {', '.join(IMAGE_ENCODINGS)}"
        )


def keep_encoded(readers: Sequence[Reader], column: str) -> None:
    """Make readers give the files of an image column as bytes, where Streaming would open them with Pillow.

    Bytes are decoded in part, which is faster, and by none but the decoders that we allow.
    """
    for reader in readers:
        assert isinstance(reader, MDSReader)  # the index has been read
        at = reader.column_names.index(column)
        if reader.column_encodings[at] in ("jpeg", "png"):
            reader.column_encodings[at] = "bytes"


def _check_shard(folder: Path, shard: dict[str, Any]) -> None:
    for file in _files(shard):
        name = Path(file["basename"])
        if name.is_absolute() or ".." in name.parts:
            raise InputError(f"{folder}: its {INDEX} names a file outside of it: {name}")
    if "pkl" in shard["column_encodings"]:
        raise InputError(f"{folder}: has a column of pickles, which may hold code: it is not read")
    # Each sample has at least the number of its place; more of them would take memory for what is not there.
    raw, num_samples = shard["raw_data"], shard["samples"]
    if not 0 < 4 * num_samples <= raw["bytes"]:
        raise InputError(f"{folder}: its {INDEX} claims {num_samples} samples in {raw['bytes']} bytes")


def _check_columns(folder: Path, shard: dict[str, Any], columns: tuple[str, ...], option: str | None) -> None:
    missing = [column for column in columns if column not in shard["column_names"]]
    if missing:
        hint = f"; choose with {option}" if option else ""
        names = ", ".join(shard["column_names"])
        raise InputError(f"{folder}: no column {missing[0]!r}; the data set has: {names}{hint}")


def _check_files(folder: Path, shard: dict[str, Any]) -> None:
    candidates = _files(shard)
    if not any((folder / file["basename"]).is_file() for file in candidates):
        raise InputError(f"{folder / candidates[0]['basename']}: the shard is missing")
    for file in candidates:
        path = folder / file["basename"]
        if path.is_file() and path.stat().st_size != file["bytes"]:
            raise InputError(f"{path}: the shard has {path.stat().st_size} bytes, the index says {file['bytes']}")


def describe_data(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """A data set's identity: what its samples are, and in which shards; not where it is, nor what its files are called.

    Args:
        shards: As an index lists them.
    """
    contents = [(shard["samples"], shard["raw_data"]["bytes"], shard["raw_data"].get("hashes")) for shard in shards]
    return {
        "sha256": hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest(),
        "samples": sum(shard["samples"] for shard in shards),
        "shards": len(shards),
    }


SUMMARY = "conversion.json"
