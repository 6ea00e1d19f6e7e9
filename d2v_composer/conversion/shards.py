"""Plan, write and verify single shards."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from streaming import MDSWriter
from streaming.base.format.mds import MDSReader
from streaming.base.hashing import get_hash

from d2v_composer.conversion.destination import ATTEMPTS, Destination
from d2v_composer.conversion.rgb_jpeg import as_rgb_jpeg
from d2v_composer.data.image_folder import ImageFile, read_image_file
from d2v_composer.system.atomic_files import write_atomically
from d2v_composer.system.errors import InputError, UnreadableImageError
from d2v_composer.system.retry import reason

__all__ = [
    "Encoding",
    "ShardJob",
    "ShardRecord",
    "convert_shard",
    "plan_shards",
    "record_path",
    "saved_records",
    "shard_names",
    "verify_shard",
]

WRITTEN_HASHES = ["sha1", "xxh64"]
LARGEST_SHARD = (1 << 32) - 1
# A resized JPEG has 0.3 bytes per pixel, at an aspect ratio of 4:3. Only the size of shards depends on it.
BYTES_PER_SQUARE = 0.4


class Encoding(NamedTuple):
    """The encoding of stored images."""

    resize: int | None = None
    """Shrink a longer short side to this many pixels; ``None``: keep the files' bytes."""
    quality: int = 90
    """The quality of JPEGs that are encoded again."""


class ShardJob(NamedTuple):
    """A shard to write."""

    number: int
    root: Path
    files: list[ImageFile]
    encoding: Encoding
    skip_unreadable: bool
    destination: Destination


class ShardRecord(NamedTuple):
    """A finished shard."""

    number: int
    entry: dict[str, Any] | None
    """Its entry in the index; ``None`` if none of its images was readable."""
    converted: dict[str, int]
    skipped: list[str]


def plan_shards(
    files: Sequence[ImageFile], encoding: Encoding, seed: int, shard_bytes: int
) -> Iterator[list[ImageFile]]:
    """Yield the images of each shard of about ``shard_bytes``, in a random order."""
    largest_image = encoding.resize**2 * BYTES_PER_SQUARE if encoding.resize else LARGEST_SHARD
    shard: list[ImageFile] = []
    size = 0.0
    for i in np.random.default_rng(seed).permutation(len(files)):
        image_bytes = min(files[i].num_bytes, largest_image)
        if shard and size + image_bytes > shard_bytes:
            yield shard
            shard, size = [], 0.0
        shard.append(files[i])
        size += image_bytes
    yield shard


def convert_shard(job: ShardJob) -> ShardRecord:
    """Write and publish a shard, then write its record."""
    converted: Counter[str] = Counter()
    skipped: list[str] = []
    columns = {"image": "bytes"} if job.files[0].label is None else {"image": "bytes", "label": "int"}
    with job.destination.published(f"shard.{job.number:05}.mds") as path:
        writer = MDSWriter(
            columns=columns, out=str(path.parent / "mds"), hashes=WRITTEN_HASHES, size_limit=LARGEST_SHARD
        )
        for file in job.files:
            try:
                image, kind = _read_image(job, file)
            except UnreadableImageError as error:
                if not job.skip_unreadable:
                    raise InputError(f"{error}; --skip-unreadable skips such images") from error
                skipped.append(str(error).removeprefix(f"{job.root}/"))
                continue
            converted.update([kind] if kind else [])
            writer.write({"image": image, "label": file.label})
        entry = _close_shard(writer, path)
    record = ShardRecord(job.number, entry, dict(sorted(converted.items())), skipped)
    write_atomically(record_path(job.destination, job.number), json.dumps(record._asdict()))
    return record


def _read_image(job: ShardJob, file: ImageFile) -> tuple[bytes, str | None]:
    path = job.root / file.path
    try:
        return as_rgb_jpeg(read_image_file(path), str(path), job.encoding.resize, job.encoding.quality)
    except (OSError, MemoryError) as error:
        raise RuntimeError(f"{path}: cannot be read now ({reason(error)}): run again to resume") from error


def _close_shard(writer: MDSWriter, path: Path) -> dict[str, Any] | None:
    # Not writer.finish(), which writes an index: an unfinished data set must have none.
    if writer.new_samples:
        writer.flush_shard()
    writer.executor.shutdown()
    if not writer.shards:
        return None
    if len(writer.shards) > 1:
        raise RuntimeError(f"{path.name}: more than {LARGEST_SHARD} bytes of images: choose a smaller --shard-size")
    entry = writer.shards[0]
    (Path(writer.local) / entry["raw_data"]["basename"]).rename(path)
    entry["raw_data"]["basename"] = path.name
    return entry


def verify_shard(job: tuple[Destination, ShardRecord]) -> str | None:
    """Read a published shard back, and return its fault, if there is one."""
    destination, record = job
    assert record.entry is not None  # the shard was written
    raw, num_samples = record.entry["raw_data"], record.entry["samples"]
    shard = f"{destination.address}/{raw['basename']}"
    with destination.read_back(raw["basename"], ATTEMPTS) as path:
        if not path.exists():
            return f"{shard}: cannot be read back"
        content = path.read_bytes()
        if len(content) != raw["bytes"]:
            return f"{shard}: has {len(content)} bytes instead of {raw['bytes']}"
        if any(get_hash(name, content) != value for name, value in raw["hashes"].items()):
            return f"{shard}: its content has changed"
        found = sum(1 for sample in MDSReader.from_json(str(path.parent), None, record.entry) if sample["image"])
        return None if found == num_samples else f"{shard}: has {found} images instead of {num_samples}"


def record_path(destination: Destination, number: int) -> Path:
    """Return the path of a finished shard's record."""
    return destination.work / "records" / f"{number}.json"


def saved_records(destination: Destination) -> list[ShardRecord]:
    """Read the records of all published shards."""
    return [ShardRecord(**json.loads(path.read_bytes())) for path in record_path(destination, 0).parent.glob("*.json")]


def shard_names(destination: Destination) -> set[str]:
    """Return the names of all shards at the destination, those of other conversions too.

    Raises:
        InputError: The object store cannot be listed.
    """
    return {name for name in destination.names("shard.") if name.endswith(".mds")}
