"""Read the index of an MDS folder (MosaicML Streaming's format), and check it before use."""

import hashlib
import json
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2v_composer.data.mds import ENCODINGS
from d2v_composer.data.modality import Modality
from d2v_composer.system.addresses import hide_secrets
from d2v_composer.system.errors import InputError, reading, reason
from d2v_composer.system.fetch import transfer
from d2v_composer.system.files import partial_file
from d2v_composer.system.retry import is_lasting, is_local, retry

INDEX = "index.json"
# Timeout of one attempt to fetch it.
INDEX_SECONDS = 60.0
SUMMARY = "conversion.json"
LARGEST = 1 << 63

log = logging.getLogger(__name__)


def fetch_index(remote: str, local: Path, retry_timeout: float = 0.0) -> None:
    """Fetch the index of a remote data set, and the summary of its conversion if it has one, into its cache.

    If the store is unreachable, use files that are here, with a warning; shards are verified by the index.

    Args:
        remote: The data set's address.
        local: The cache.
        retry_timeout: How long an unreachable store is retried if no such file is here, in seconds.

    Raises:
        InputError: The index is missing or corrupt, the store is unreachable, or ``local`` is another data set's cache.
    """
    for name in (INDEX, SUMMARY):
        index, address = local / name, f"{remote.rstrip('/')}/{name}"
        here = index.read_bytes() if index.exists() else None
        try:
            with partial_file(index) as fetched:
                timeout = retry_timeout if here is None else 0.0
                retry(partial(transfer, address, fetched, INDEX_SECONDS), address, timeout, lasting_attempts=1)
                with reading(address):
                    json.loads(fetched.read_bytes())
                if here not in (None, fetched.read_bytes()):
                    raise InputError(f"{local}: holds shards of a data set other than {remote}; choose another folder")
        except InputError:
            raise
        except Exception as error:
            message = f"{hide_secrets(address)}: cannot be fetched ({reason(error)})"
            if not is_lasting(error) and not is_local(error) and here is not None:
                log.warning("%s; using the file in %s", message, local)
            elif name == INDEX or not is_lasting(error):
                raise InputError(message) from error
            return


def check_room(shards: list[dict[str, Any]], local: Path, cache_limit: int | None, share: float) -> str | None:
    """Return an error message if the disk lacks space for what a node still has to fetch of its share, 0 to 1."""
    sizes = {local / shard["raw_data"]["basename"]: shard["raw_data"]["bytes"] for shard in shards}
    wanted = min(int(share * sum(sizes.values())), cache_limit or LARGEST)
    needed = wanted - sum(size for path, size in sizes.items() if path.is_file())
    if needed <= (free := shutil.disk_usage(local).free):
        return None
    return (
        f"{local}: {needed / 1e9:.1f} GB of shards must still be fetched, but only {free / 1e9:.1f} GB is free; free "
        "disk space, or set a cache limit"
    )


def read_index(
    folder: Path,
    column: str,
    modality: Modality | type[Modality],
    *,
    option: str,
    source: str | None = None,
    other_columns: tuple[str, ...] = (),
    shards_may_be_missing: bool = False,
) -> list[dict[str, Any]]:
    """Read and check the shards that the index of a data set lists.

    Args:
        folder: The folder of the ``index.json``.
        column: The column of samples.
        modality: What the samples are.
        option: The setting that chooses the columns, for the error.
        source: The data set's name, for the error; default: the folder.
        other_columns: Further columns that the samples must have.
        shards_may_be_missing: They are fetched later; otherwise each must be there in its full size.

    Raises:
        InputError: The index is missing or corrupt, lists no samples or lacks a column, the column cannot hold such
            samples, or a shard is missing or has another size.
    """
    source = source or str(folder)
    if not is_mds(folder):
        raise InputError(f"{folder}: no MDS {INDEX}: {'not an MDS data set' if folder.is_dir() else 'no such folder'}")
    with reading(folder / INDEX):
        shards = json.loads((folder / INDEX).read_bytes())["shards"]
        for shard in shards:
            files = [shard[kind] for kind in ("raw_data", "zip_data") if shard[kind] is not None]
            for file in files:
                if Path(file["basename"]).is_absolute() or ".." in Path(file["basename"]).parts:
                    raise InputError(f"{source}: its {INDEX} names a file outside the folder: {file['basename']}")
            encodings = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
            if "pkl" in encodings.values():
                raise InputError(f"{source}: has a column of pickles, which may run code and are not supported")
            for name, known in [(column, modality.encodings), *((name, ENCODINGS) for name in other_columns)]:
                if name not in encodings:
                    names = ", ".join(encodings)
                    raise InputError(
                        f"{source}: no column {name!r}; the data set has: {names}; choose one with {option}"
                    )
                if encodings[name] not in known:
                    found, allowed = encodings[name], ", ".join(known)
                    raise InputError(f"{source}: its column {name!r} is {found}; expected one of {allowed}")
            # Each sample takes at least the four bytes of its offset; a larger number would take memory for no samples.
            num_bytes, num_samples = shard["raw_data"]["bytes"], shard["samples"]
            if not 0 < 4 * num_samples <= num_bytes:
                raise InputError(f"{source}: its {INDEX} claims {num_samples} samples in {num_bytes} bytes")
            if not shards_may_be_missing:
                _check_file(folder, files)
    if not shards:
        raise InputError(f"{source}: the data set is empty: its {INDEX} lists no samples")
    return shards


def is_mds(folder: Path) -> bool:
    """Return True if a folder holds an MDS data set, maybe a damaged one, and not another program's ``index.json``."""
    if not (folder / INDEX).is_file():
        return False
    try:
        index = json.loads((folder / INDEX).read_bytes())
    except (RecursionError, ValueError):
        return True
    return isinstance(index, dict) and "shards" in index


def _check_file(folder: Path, files: list[dict[str, Any]]) -> None:
    for path, num_bytes in ((folder / file["basename"], file["bytes"]) for file in files):
        if path.is_file():
            if (size := path.stat().st_size) != num_bytes:
                raise InputError(f"{path}: the shard has {size} bytes, but the index says {num_bytes}")
            return
    raise InputError(f"{folder / files[0]['basename']}: the shard is missing")


def read_lengths(folder: Path, num_samples: int, source: str | None = None) -> NDArray[np.int64]:
    """Read the lengths of a data set's samples, (N,), from the summary of its conversion in a folder.

    Raises:
        InputError: The summary is missing or corrupt, or has not all lengths; ``source`` names the data set.
    """
    lengths, path = np.zeros(0, np.int64), folder / SUMMARY
    if path.is_file():
        with reading(path):
            lengths = np.array(json.loads(path.read_bytes()).get("lengths", []), np.int64).ravel()
    if len(lengths) != num_samples:
        expected = f"expected the lengths of {num_samples} samples in {SUMMARY}, got {len(lengths)}"
        raise InputError(f"{source or folder}: {expected}; convert the data set with d2v convert-audio")
    return lengths


def describe_data(shards: list[dict[str, Any]], lengths: NDArray[np.int64] | None = None) -> dict[str, Any]:
    """Describe the content of a data set; its location and file names do not matter."""
    contents: list[Any] = [
        (shard["samples"], shard["raw_data"]["bytes"], shard["raw_data"].get("hashes")) for shard in shards
    ]
    contents += [] if lengths is None else lengths.tolist()
    return {
        "sha256": hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest(),
        "samples": sum(shard["samples"] for shard in shards),
        "shards": len(shards),
    }
