"""Convert image files to MDS shards, on disk or directly in an object store, all or nothing.

One job makes one shard. The images of each shard are planned beforehand from the seed and the file sizes, so the result
does not depend on the number of workers, and an interrupted conversion resumes. A shard's record is written after the
shard; the index, without which there is no data set, comes last, when every shard was read back.
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
from d2v_composer.system.progress import progress_bar
from d2v_composer.system.worker_lifetime import FORK, end_with_parent, end_workers

__all__ = ["Conversion", "convert_images"]

SHARD_BYTES = 1 << 26
LOCK_TIMEOUT = 10

log = logging.getLogger(__name__)

Job = TypeVar("Job")
ResultT = TypeVar("ResultT")


class Conversion(NamedTuple):
    """The result of a conversion."""

    out: str
    images: int
    classes: int | None
    """``None`` if the images have no labels."""
    bytes: int
    """The size of all shards."""
    shards: int
    converted: dict[str, int]
    """The number of images that were not RGB JPEGs, by kind."""
    skipped: list[str]
    """The reason for each unreadable image."""
    ignored: dict[str, int]
    """The number of other files in the source, by suffix."""
    resumed: int
    """The shards that an interrupted run had finished."""
    leftover: list[str] | None
    """Other shards at the destination, which are in no index; ``None`` if it cannot be listed."""


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
    """Write images to an MDS data set with the columns ``image`` (a JPEG's bytes) and, if known, ``label``.

    Args:
        source: The images; see :func:`find_images`.
        out: A folder, or an address in any store that mosaicml-streaming can write: s3://, gs://, …
        encoding: How to store the images.
        seed: The seed of the order.
        workers: Processes that convert.
        shard_bytes: The approximate size of a shard.
        skip_unreadable: Skip and list unreadable images instead of stopping.

    Raises:
        InputError: An image is unreadable, or ``out`` cannot be written or holds a data set.
        RuntimeError: A shard differs from what was written.
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
        with ProcessPoolExecutor(workers, FORK, _start_worker) as pool:
            records = _convert(pool, jobs, resumed)
            _verify(pool, destination, records, expected=len(source.files))
        conversion = _result(source, destination, records, len(resumed))
        summary = {"finished": True, "images": conversion.images, "seed": seed} | encoding._asdict()
        summary |= {"converted": conversion.converted, "skipped": conversion.skipped, "classes": source.classes}
        _publish(destination, summary, _entries(records))
    return conversion


def _resume(destination: Destination, skip_unreadable: bool, fingerprint: str) -> list[ShardRecord]:
    """Return the shards that an interrupted run of the same conversion has finished.

    The shards of another conversion are deleted from a folder. In an object store they are overwritten, or listed at
    the end: Streaming cannot delete, and writing does not require that permission.
    """
    plan, records = destination.work / "plan", destination.work / "records"
    if not plan.exists() or plan.read_text() != fingerprint:
        if not destination.remote:
            for name in shard_names(destination):
                (Path(destination.address) / name).unlink()
        shutil.rmtree(records, ignore_errors=True)
        write_atomically(plan, fingerprint)
    return [record for record in saved_records(destination) if skip_unreadable or not record.skipped]


def _fingerprint(source: ImageSource, encoding: Encoding, seed: int, shard_bytes: int) -> str:
    state = hashlib.sha256(repr((str(source.root.resolve()), encoding, seed, shard_bytes)).encode())
    for file in source.files:
        state.update(repr(tuple(file)).encode())
    return state.hexdigest()


def _convert(pool: ProcessPoolExecutor, jobs: list[ShardJob], resumed: list[ShardRecord]) -> list[ShardRecord]:
    done, records = {record.number for record in resumed}, list(resumed)
    missing = [job for job in jobs if job.number not in done]
    total = sum(len(job.files) for job in jobs)
    initial = total - sum(len(job.files) for job in missing)
    with progress_bar(total=total, initial=initial, desc="converting", unit="images") as bar:
        for job, record in _run(pool, convert_shard, missing):
            records.append(record)
            bar.update(len(job.files))
    return sorted(records)


def _verify(pool: ProcessPoolExecutor, destination: Destination, records: list[ShardRecord], expected: int) -> None:
    jobs = [(destination, record) for record in records if record.entry is not None]
    faults = []
    verified = _run(pool, verify_shard, jobs)
    for (_, record), fault in progress_bar(verified, total=len(jobs), desc="verifying", unit="shards"):
        if fault is not None:
            faults.append(fault)
            record_path(destination, record.number).unlink()
    if faults:
        raise RuntimeError(
            f"{len(faults)} of {len(jobs)} shards differ from what was written; run again to replace them: "
            f"{min(faults)}"
        )
    num_images = sum(entry["samples"] for entry in _entries(records))
    num_skipped = sum(len(record.skipped) for record in records)
    if num_images + num_skipped != expected:
        raise RuntimeError(f"{destination.address}: {num_images} images and {num_skipped} skipped ones of {expected}")
    if not num_images:
        raise InputError(f"{destination.address}: none of the {expected} images can be read")


def _run(
    pool: ProcessPoolExecutor, function: Callable[[Job], ResultT], jobs: Sequence[Job]
) -> Iterator[tuple[Job, ResultT]]:
    futures = {pool.submit(function, job): job for job in jobs}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    except KeyboardInterrupt:
        end_workers()  # in the middle of their shards, which take seconds
        raise KeyboardInterrupt("finished shards are kept, the same command resumes") from None
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def _start_worker() -> None:
    # Streaming's uploads show a bar too: a killed worker must not keep the lock of this process's bars.
    tqdm.set_lock(threading.RLock())
    end_with_parent()


def _result(source: ImageSource, destination: Destination, records: list[ShardRecord], resumed: int) -> Conversion:
    entries = _entries(records)
    labels = {file.label for file in source.files} - {None}
    converted = sum((Counter(record.converted) for record in records), Counter())
    try:
        leftover = sorted(shard_names(destination) - {entry["raw_data"]["basename"] for entry in entries})
    except InputError as error:
        log.warning("%s", error)
        leftover = None
    return Conversion(
        out=destination.address,
        images=sum(entry["samples"] for entry in entries),
        classes=len(source.classes or labels) or None,
        bytes=sum(entry["raw_data"]["bytes"] for entry in entries),
        shards=len(entries),
        converted=dict(sorted(converted.items())),
        skipped=[line for record in records for line in record.skipped],
        ignored=source.ignored,
        resumed=resumed,
        leftover=leftover,
    )


def _publish(destination: Destination, summary: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    index = json.dumps({"version": 2, "shards": entries}, sort_keys=True)
    destination.publish_text(SUMMARY, json.dumps(summary))
    destination.publish_text(INDEX, index)
    with destination.read_back(INDEX, ATTEMPTS) as path:
        if not path.exists() or path.read_text() != index:
            raise RuntimeError(f"{destination.address}/{INDEX}: cannot be read back as it was written")
    destination.close()


def _entries(records: list[ShardRecord]) -> list[dict[str, Any]]:
    return [record.entry for record in records if record.entry is not None]
