"""Image files to MDS shards, on disk or straight into an object store, all or nothing.

One job makes one shard: which images a shard has is planned before, from the seed and the files' sizes, so the result
does not depend on the number of workers, and an interrupted conversion goes on where it was. A shard's record is
written when the shard is in its place; the index, without which there is no data set, comes last, after every shard
was read back.
"""

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

import numpy as np
from streaming import MDSWriter
from streaming.base.format.mds import MDSReader
from streaming.base.hashing import get_hash
from streaming.base.storage import CloudUploader
from streaming.base.util import retry
from tqdm import tqdm

from d2v_composer.data.image_sources import ImageFile, ImageSource, as_rgb_jpeg
from d2v_composer.data.mds import INDEX
from d2v_composer.errors import InputError
from d2v_composer.fetch import cache_folder, download

__all__ = ["Conversion", "Encoding", "convert_images"]

HASHES = ["sha1", "xxh64"]
SUMMARY = "conversion.json"
SHARD_BYTES = 1 << 26
LARGEST_SHARD = (1 << 32) - 1
ATTEMPTS = 6  # to upload or read back a file, with Streaming's back-off: half a minute
LOCK_TIMEOUT = 10
# Of a resized JPEG: 0.3 a pixel, at an aspect ratio of 4:3. Only the size of shards depends on it.
BYTES_PER_SQUARE = 0.4

Job = TypeVar("Job")
Result = TypeVar("Result")


class Encoding(NamedTuple):
    """How images are stored."""

    resize: int | None = None
    """What a longer short side becomes, in pixels; ``None``: the files' bytes as they are."""
    quality: int = 90
    """Of the JPEGs that are encoded anew."""


class Conversion(NamedTuple):
    """What a conversion has written."""

    out: str
    images: int
    classes: int | None
    """``None``: the images have no labels."""
    bytes: int
    """Of all shards."""
    shards: int
    converted: dict[str, int]
    """How many images were not RGB JPEGs before, by kind."""
    skipped: list[str]
    """The unreadable ones, with the reason."""
    ignored: dict[str, int]
    """How many other files the source has, by suffix."""
    resumed: int
    """How many of the shards an interrupted run had written."""


class Target(NamedTuple):
    """Where a data set is written."""

    address: str
    remote: bool
    work: Path
    """For what is not finished: records of finished shards, and the shards being written, one a worker."""


class ShardJob(NamedTuple):
    """One shard to be made."""

    number: int
    root: Path
    files: list[ImageFile]
    encoding: Encoding
    skip_unreadable: bool
    target: Target


class ShardRecord(NamedTuple):
    """One shard made."""

    number: int
    entry: dict[str, Any] | None
    """As in the index; ``None`` where no image of it was readable."""
    converted: dict[str, int]
    skipped: list[str]


def convert_images(
    source: ImageSource,
    out: str | Path,
    encoding: Encoding,
    *,
    seed: int = 0,
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
    skip_unreadable: bool = False,
) -> Conversion:
    """Write images to an MDS data set with the columns ``image`` (a JPEG's bytes) and, where known, ``label``.

    Args:
        source: The images; see :func:`find_images`.
        out: A folder, or s3://, gs://, … (whatever mosaicml-streaming writes to).
        encoding: How they are stored.
        seed: Of the order.
        workers: How many processes convert.
        shard_bytes: About what a shard holds.
        skip_unreadable: Whether unreadable images are left out, and listed, instead of ending the conversion.

    Raises:
        InputError: An image is unreadable, or ``out`` cannot be written or has a data set.
        RuntimeError: What was written is not what is there.
    """
    target = _target(str(out), source.root)
    jobs = [
        ShardJob(number, source.root, files, encoding, skip_unreadable, target)
        for number, files in enumerate(_plan_shards(source.files, encoding, seed, shard_bytes))
    ]
    with _sole_conversion(target):
        _open(target)
        resumed = _resume(target, skip_unreadable, fingerprint=_fingerprint(source, encoding, seed, shard_bytes))
        with ProcessPoolExecutor(workers, initializer=_end_with_parent) as pool:
            records = _convert(pool, jobs, resumed)
            _verify(pool, target, records, expected=len(source.files))
        conversion = _summary(source, target, records, len(resumed))
        _finish(target, records, conversion, source.classes, encoding, seed)
    return conversion


def _plan_shards(
    files: Sequence[ImageFile], encoding: Encoding, seed: int, shard_bytes: int
) -> Iterator[list[ImageFile]]:
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


def _convert(pool: ProcessPoolExecutor, jobs: list[ShardJob], resumed: list[ShardRecord]) -> list[ShardRecord]:
    done = {record.number for record in resumed}
    records = list(resumed)
    with tqdm(total=sum(len(job.files) for job in jobs), desc="converting", unit="img") as bar:
        bar.update(sum(len(job.files) for job in jobs if job.number in done))
        for job, record in _run(pool, convert_shard, [job for job in jobs if job.number not in done]):
            records.append(record)
            bar.update(len(job.files))
    return sorted(records)


def _run(
    pool: ProcessPoolExecutor, function: Callable[[Job], Result], jobs: Sequence[Job]
) -> Iterator[tuple[Job, Result]]:
    futures = {pool.submit(function, job): job for job in jobs}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def _end_with_parent() -> None:
    # A killed conversion must not leave workers behind that go on with what was queued.
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def convert_shard(job: ShardJob) -> ShardRecord:
    """Make one shard and put it in its place, then write its record."""
    converted: Counter[str] = Counter()
    skipped: list[str] = []
    columns = {"image": "bytes"} if job.files[0].label is None else {"image": "bytes", "label": "int"}
    with _published(job.target, f"shard.{job.number:05}.mds") as path:
        writer = MDSWriter(columns=columns, out=str(path.parent / "mds"), hashes=HASHES, size_limit=LARGEST_SHARD)
        for file in job.files:
            try:
                image, kind = _read_image(job, file)
            except InputError as error:
                if not job.skip_unreadable:
                    raise InputError(f"{job.root}/{error}; --skip-unreadable leaves such images out") from error
                skipped.append(str(error))
                continue
            converted.update([kind] if kind else [])
            writer.write({"image": image, "label": file.label})
        entry = _close_shard(writer, path)
    record = ShardRecord(job.number, entry, dict(sorted(converted.items())), skipped)
    _write_atomically(_record_path(job.target, job.number), json.dumps(record._asdict()))
    return record


def _read_image(job: ShardJob, file: ImageFile) -> tuple[bytes, str | None]:
    try:
        encoded = (job.root / file.path).read_bytes()
    except OSError as error:
        raise InputError(f"{file.path}: cannot be read ({error.strerror})") from error
    return as_rgb_jpeg(encoded, file.path, job.encoding.resize, job.encoding.quality)


def _close_shard(writer: MDSWriter, path: Path) -> dict[str, Any] | None:
    # Not writer.finish(): that writes an index, and a shard of an unfinished data set must have none.
    if writer.new_samples:
        writer.flush_shard()
    writer.executor.shutdown()
    if not writer.shards:
        return None
    if len(writer.shards) > 1:
        raise RuntimeError(f"{path.name}: its images have more than {LARGEST_SHARD} bytes; make --shard-size smaller")
    entry = writer.shards[0]
    (Path(writer.local) / entry["raw_data"]["basename"]).rename(path)
    entry["raw_data"]["basename"] = path.name
    return entry


def _verify(pool: ProcessPoolExecutor, target: Target, records: list[ShardRecord], expected: int) -> None:
    faults = []
    jobs = [(target, record) for record in records if record.entry is not None]
    with tqdm(total=len(jobs), desc="verifying", unit="shard") as bar:
        for (_, record), fault in _run(pool, verify_shard, jobs):
            bar.update()
            if fault is not None:
                faults.append(fault)
                _record_path(target, record.number).unlink()
    if faults:
        raise RuntimeError(
            f"{len(faults)} of {len(jobs)} shards are not what was written, run again to replace them: {min(faults)}"
        )
    num_images = sum(entry["samples"] for entry in _entries(records))
    num_skipped = sum(len(record.skipped) for record in records)
    if num_images + num_skipped != expected:
        raise RuntimeError(f"{target.address}: {num_images} images and {num_skipped} skipped ones of {expected}")
    if not num_images:
        raise InputError(f"{target.address}: none of the {expected} images can be read")


def verify_shard(job: tuple[Target, ShardRecord]) -> str | None:
    """Read a shard from where it is; what is wrong with it, if anything."""
    target, record = job
    assert record.entry is not None
    name, num_bytes = record.entry["raw_data"]["basename"], record.entry["raw_data"]["bytes"]
    with _read_back(target, name, ATTEMPTS) as path:
        if not path.exists():
            return f"{target.address}/{name}: cannot be read back"
        content = path.read_bytes()
        if len(content) != num_bytes:
            return f"{target.address}/{name}: has {len(content)} bytes instead of {num_bytes}"
        if any(
            get_hash(hash_name, content) != value for hash_name, value in record.entry["raw_data"]["hashes"].items()
        ):
            return f"{target.address}/{name}: its content has changed"
        reader = MDSReader.from_json(str(path.parent), None, record.entry)
        num_samples = sum(1 for sample in reader if sample["image"])
        if num_samples != record.entry["samples"]:
            return f"{target.address}/{name}: has {num_samples} images instead of {record.entry['samples']}"
    return None


def _summary(source: ImageSource, target: Target, records: list[ShardRecord], resumed: int) -> Conversion:
    entries = _entries(records)
    labels = {file.label for file in source.files} - {None}
    return Conversion(
        out=target.address,
        images=sum(entry["samples"] for entry in entries),
        classes=len(source.classes or labels) or None,
        bytes=sum(entry["raw_data"]["bytes"] for entry in entries),
        shards=len(entries),
        converted=dict(sorted(sum((Counter(record.converted) for record in records), Counter()).items())),
        skipped=[line for record in records for line in record.skipped],
        ignored=source.ignored,
        resumed=resumed,
    )


def _finish(
    target: Target,
    records: list[ShardRecord],
    conversion: Conversion,
    classes: list[str] | None,
    encoding: Encoding,
    seed: int,
) -> None:
    summary = {"finished": True, "images": conversion.images, "seed": seed} | encoding._asdict()
    summary |= {"converted": conversion.converted, "skipped": conversion.skipped, "classes": classes}
    index = json.dumps({"version": 2, "shards": _entries(records)}, sort_keys=True)
    _publish_text(target, SUMMARY, json.dumps(summary))
    _publish_text(target, INDEX, index)
    with _read_back(target, INDEX, ATTEMPTS) as path:
        if not path.exists() or path.read_text() != index:
            raise RuntimeError(f"{target.address}/{INDEX}: cannot be read back as it was written")
    shutil.rmtree(target.work)


def _entries(records: list[ShardRecord]) -> list[dict[str, Any]]:
    return [record.entry for record in records if record.entry is not None]


def _target(out: str, source: Path) -> Target:
    if urllib.parse.urlparse(out).scheme:
        out = out.rstrip("/")
        return Target(out, True, cache_folder() / "conversions" / hashlib.sha256(out.encode()).hexdigest()[:16])
    folder = Path(out).resolve()
    if folder.is_relative_to(source.resolve()):
        raise InputError(f"{out}: lies in the folder of the images, {source}")
    return Target(out, False, folder / ".converting")


@contextmanager
def _sole_conversion(target: Target) -> Iterator[None]:
    identity = hashlib.sha256(str(target.work.absolute()).encode()).hexdigest()[:16]
    path = cache_folder() / "conversions" / f"{identity}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + LOCK_TIMEOUT
    # Not filelock: forked workers must inherit the lock, so that those of a conversion that was just killed hold it
    # until they are gone.
    with open(path, "w") as lock:
        while not _acquire(lock):
            if time.monotonic() > deadline:
                raise InputError(f"{target.address}: another conversion is writing there")
            time.sleep(0.05)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)


def _acquire(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _open(target: Target) -> None:
    """Make sure that the target can be written, and read where it is remote, and has no finished data set.

    Raises:
        InputError: One of it is not so.
    """
    _refuse_finished(target)
    folder = Path(target.address)
    if not target.remote and folder.is_dir() and any(folder.iterdir()) and not target.work.is_dir():
        raise InputError(f"{folder}: is not empty, and what it has is not of an interrupted conversion")
    try:
        target.work.mkdir(parents=True, exist_ok=True)
        _publish_text(target, SUMMARY, json.dumps({"finished": False}))
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise InputError(f"{target.address}: cannot be written ({reason[0] if reason else error!r})") from error
    with _read_back(target, SUMMARY) as path:
        if not path.exists():
            raise InputError(f"{target.address}: can be written, but what was written cannot be read back")
    _refuse_finished(target)  # again: an index that could not be read at first was not necessarily absent


def _refuse_finished(target: Target) -> None:
    with _read_back(target, INDEX) as path:
        if path.exists():
            shutil.rmtree(target.work, ignore_errors=True)  # an interruption may have come between index and clean-up
            raise InputError(f"{target.address}: has a finished data set; remove it, or write elsewhere")


def _resume(target: Target, skip_unreadable: bool, fingerprint: str) -> list[ShardRecord]:
    """What an interrupted run of the same conversion has finished; what another one has left is removed."""
    plan = target.work / "plan"
    if not plan.exists() or plan.read_text() != fingerprint:
        if not target.remote:
            for shard in Path(target.address).glob("shard.*.mds"):
                shard.unlink()
        shutil.rmtree(target.work / "records", ignore_errors=True)
        _write_atomically(plan, fingerprint)
    (target.work / "records").mkdir(exist_ok=True)
    contents = [json.loads(path.read_bytes()) for path in (target.work / "records").glob("*.json")]
    records = [ShardRecord(**content) for content in contents]
    return [record for record in records if skip_unreadable or not record.skipped]


def _fingerprint(source: ImageSource, encoding: Encoding, seed: int, shard_bytes: int) -> str:
    state = hashlib.sha256(repr((str(source.root.resolve()), encoding, seed, shard_bytes)).encode())
    for file in source.files:
        state.update(repr(tuple(file)).encode())
    return state.hexdigest()


def _record_path(target: Target, number: int) -> Path:
    return target.work / "records" / f"{number}.json"


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


@contextmanager
def _published(target: Target, name: str) -> Iterator[Path]:
    """A path for a file that comes to its place, whole, when the block ends."""
    folder = _empty_folder(target.work / f"{name}.writing")
    # Before the file is made: the uploader insists on an empty folder, and finds out whether there is a bucket.
    uploader = None
    if target.remote:
        uploader = CloudUploader.get((str(folder), target.address), keep_local=True, retry=ATTEMPTS)
    yield folder / name
    if (folder / name).exists():
        if uploader is not None:
            uploader.upload_file(name)
        else:
            (folder / name).replace(Path(target.address) / name)
    shutil.rmtree(folder)


def _publish_text(target: Target, name: str, text: str) -> None:
    with _published(target, name) as path:
        path.write_text(text)


@contextmanager
def _read_back(target: Target, name: str, attempts: int = 1) -> Iterator[Path]:
    """What the target has of that name: a path that does not exist where it has nothing, or cannot be reached."""
    if not target.remote:
        yield Path(target.address) / name
        return
    folder = _empty_folder(target.work / f"{name}.reading")
    try:
        with suppress(InputError):
            retry(InputError, num_attempts=attempts)(download)(f"{target.address}/{name}", folder / name)
        yield folder / name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _empty_folder(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
