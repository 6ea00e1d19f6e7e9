"""Image files to MDS shards, on disk or straight into an object store, all or nothing.

One job makes one shard: which images a shard has is planned before, from the seed and the files' sizes, so the result
does not depend on the number of workers, and an interrupted conversion goes on where it was. A shard's record is
written when the shard is in its place; the index, without which there is no data set, comes last, after every shard
was read back.
"""

import hashlib
import json
import logging
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from d2v_composer.conversion.destination import ATTEMPTS, Destination
from d2v_composer.conversion.image_source import ImageSource
from d2v_composer.conversion.shards import (
    Encoding,
    ShardJob,
    ShardRecord,
    convert_shard,
    plan_shards,
    record_path,
    saved_records,
    shard_names,
    verify_shard,
)
from d2v_composer.data.mds_index import INDEX, SUMMARY
from d2v_composer.system.atomic_files import write_atomically
from d2v_composer.system.errors import InputError
from d2v_composer.system.file_locks import sole_user
from d2v_composer.system.worker_lifetime import end_with_parent

__all__ = ["Conversion", "convert_images"]

SHARD_BYTES = 1 << 26
LOCK_TIMEOUT = 10

log = logging.getLogger(__name__)

Job = TypeVar("Job")
Result = TypeVar("Result")


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
    leftover: list[str] | None
    """Shards beside these that no index mentions; ``None``: an object store that cannot be listed."""


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
    destination = Destination.at(str(out))
    if not destination.remote and destination.work.is_relative_to(source.root.resolve()):
        raise InputError(f"{out}: lies in the folder of the images, {source.root}")
    jobs = [
        ShardJob(number, source.root, files, encoding, skip_unreadable, destination)
        for number, files in enumerate(plan_shards(source.files, encoding, seed, shard_bytes))
    ]
    with sole_user(destination.lock, LOCK_TIMEOUT) as alone:
        if not alone:
            raise InputError(f"{destination.address}: another conversion is writing there")
        destination.open()
        resumed = _resume(destination, skip_unreadable, fingerprint=_fingerprint(source, encoding, seed, shard_bytes))
        with ProcessPoolExecutor(workers, initializer=_start_worker) as pool:
            records = _convert(pool, jobs, resumed)
            _verify(pool, destination, records, expected=len(source.files))
        conversion = _summary(source, destination, records, len(resumed))
        _finish(destination, records, conversion, source.classes, encoding, seed)
    return conversion


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


def _start_worker() -> None:
    # Streaming's uploads have a bar too: a worker that is killed must not take the lock of this process's bars along.
    tqdm.set_lock(threading.RLock())
    end_with_parent()


def _verify(pool: ProcessPoolExecutor, destination: Destination, records: list[ShardRecord], expected: int) -> None:
    faults = []
    jobs = [(destination, record) for record in records if record.entry is not None]
    with tqdm(total=len(jobs), desc="verifying", unit="shard") as bar:
        for (_, record), fault in _run(pool, verify_shard, jobs):
            bar.update()
            if fault is not None:
                faults.append(fault)
                record_path(destination, record.number).unlink()
    if faults:
        raise RuntimeError(
            f"{len(faults)} of {len(jobs)} shards are not what was written, run again to replace them: {min(faults)}"
        )
    num_images = sum(entry["samples"] for entry in _entries(records))
    num_skipped = sum(len(record.skipped) for record in records)
    if num_images + num_skipped != expected:
        raise RuntimeError(f"{destination.address}: {num_images} images and {num_skipped} skipped ones of {expected}")
    if not num_images:
        raise InputError(f"{destination.address}: none of the {expected} images can be read")


def _summary(source: ImageSource, destination: Destination, records: list[ShardRecord], resumed: int) -> Conversion:
    entries = _entries(records)
    labels = {file.label for file in source.files} - {None}
    return Conversion(
        out=destination.address,
        images=sum(entry["samples"] for entry in entries),
        classes=len(source.classes or labels) or None,
        bytes=sum(entry["raw_data"]["bytes"] for entry in entries),
        shards=len(entries),
        converted=dict(sorted(sum((Counter(record.converted) for record in records), Counter()).items())),
        skipped=[line for record in records for line in record.skipped],
        ignored=source.ignored,
        resumed=resumed,
        leftover=_leftover(destination, entries),
    )


def _leftover(destination: Destination, entries: list[dict[str, Any]]) -> list[str] | None:
    try:
        return sorted(shard_names(destination) - {entry["raw_data"]["basename"] for entry in entries})
    except InputError as error:
        log.warning("%s", error)
        return None


def _finish(
    destination: Destination,
    records: list[ShardRecord],
    conversion: Conversion,
    classes: list[str] | None,
    encoding: Encoding,
    seed: int,
) -> None:
    summary = {"finished": True, "images": conversion.images, "seed": seed} | encoding._asdict()
    summary |= {"converted": conversion.converted, "skipped": conversion.skipped, "classes": classes}
    index = json.dumps({"version": 2, "shards": _entries(records)}, sort_keys=True)
    destination.publish_text(SUMMARY, json.dumps(summary))
    destination.publish_text(INDEX, index)
    with destination.read_back(INDEX, ATTEMPTS) as path:
        if not path.exists() or path.read_text() != index:
            raise RuntimeError(f"{destination.address}/{INDEX}: cannot be read back as it was written")
    destination.close()


def _entries(records: list[ShardRecord]) -> list[dict[str, Any]]:
    return [record.entry for record in records if record.entry is not None]


def _resume(destination: Destination, skip_unreadable: bool, fingerprint: str) -> list[ShardRecord]:
    """What an interrupted run of the same conversion has finished.

    What another one has left is removed from a folder. In an object store it is overwritten, and what is not is named
    at the end: Streaming cannot delete, and writing does not take the permission to.
    """
    plan, records = destination.work / "plan", destination.work / "records"
    if not plan.exists() or plan.read_text() != fingerprint:
        if not destination.remote:
            for name in shard_names(destination):
                (Path(destination.address) / name).unlink()
        shutil.rmtree(records, ignore_errors=True)
        write_atomically(plan, fingerprint)
    records.mkdir(exist_ok=True)
    return [record for record in saved_records(destination) if skip_unreadable or not record.skipped]


def _fingerprint(source: ImageSource, encoding: Encoding, seed: int, shard_bytes: int) -> str:
    state = hashlib.sha256(repr((str(source.root.resolve()), encoding, seed, shard_bytes)).encode())
    for file in source.files:
        state.update(repr(tuple(file)).encode())
    return state.hexdigest()
