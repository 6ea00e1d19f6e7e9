"""The index of an MDS folder (MosaicML Streaming's format), checked before anything relies on it."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streaming.base.format.base.reader import Reader
from streaming.base.format.mds import MDSReader

from d2v_composer.errors import InputError
from d2v_composer.fetch import download

__all__ = ["check_image_column", "check_room", "fetch_index", "keep_encoded", "read_index"]

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


def check_room(shards: list[dict[str, Any]], local: Path, cache_limit: int | None) -> None:
    """Make sure that the shards of a remote data set find room.

    Raises:
        InputError: The disk has less free than is still to come.
    """
    files = [shard["raw_data"] for shard in shards]
    total = sum(file["bytes"] for file in files)
    here = sum(file["bytes"] for file in files if (local / file["basename"]).is_file())
    needed, free = min(total, cache_limit or total) - here, shutil.disk_usage(local).free
    if needed > free:
        raise InputError(
            f"{local}: {needed / 1e9:.1f} GB of shards are still to come, {free / 1e9:.1f} GB of the disk are free: "
            "make room, or set a cache limit"
        )


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
