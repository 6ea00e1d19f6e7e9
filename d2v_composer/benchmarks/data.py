"""Measure how fast training images arrive: ours and others from the same photographs, interleaved, in one process.

Every contender reads all images in every pass and delivers them in batches through a torch DataLoader. A pass is a
whole epoch, from asking for the first batch to the last, with the cost of starting an epoch but not of starting worker
processes, which persist. The first pass of each does not count, so that files are in the page cache. Rows "mid-epoch"
measure an epoch from its second quarter on. "One core" is this process with all its threads on one core; the object
store is another process and may use others. Worker processes are not tied to a core.

On a machine that runs other programs, the CPU clock gives steadier rates for one core. It omits waiting, so that the
object store with a cold cache looks too fast.
"""

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from unittest.mock import patch

from streaming.base.format.mds import MDSReader
from torch.utils.data import DataLoader

from d2v_composer.benchmarks.measure import Rates, Result, Row, Table, Target, interleave, one_core
from d2v_composer.benchmarks.object_store import ObjectStore, find_server
from d2v_composer.benchmarks.photos import PhotoSet, make_photos, take_photos
from d2v_composer.benchmarks.readers import (
    FLOAT32,
    ORIGINALS,
    RESIZED,
    UINT8,
    Reader,
    decode_alone,
    image_folder,
    litdata_chunks,
    our_loader,
    ours,
    webdataset_tars,
)
from d2v_composer.conversion.convert import convert_images
from d2v_composer.conversion.image_source import find_images
from d2v_composer.conversion.shards import Encoding
from d2v_composer.data.mds_index import read_index
from d2v_composer.system.errors import InputError
from d2v_composer.system.progress import progress_bar

__all__ = ["CLOCKS", "FEWEST_IMAGES", "benchmark_data"]

FEWEST_IMAGES = 32
NUM_SHARDS = 8  # in every format, of about as many images each, so that workers have equal shares
SHORT_SIDE, QUALITY = 256, 90
BUCKET, COPIES_BUCKET = "benchmark", "copies"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "simplejpeg", "mosaicml-streaming", "litdata", "webdataset")
# "Mid-epoch" reads a data set of several copies of the images, and skips the start of an epoch.
COPIES = 4
SKIPPED = 0.25

LOCAL, WARM, COLD, DECODING = "ours, local disk", "ours, S3 warm", "ours, S3 cold", "ours, decoding alone"
COLD_MID, WARM_MID = "ours, S3 cold, mid-epoch", "ours, S3 warm, mid-epoch"
TARGETS = (
    ("originals, against ImageFolder + PIL", (LOCAL, ORIGINALS), ("ImageFolder", ORIGINALS, FLOAT32), 1.25),
    ("originals, against the best of litdata", (LOCAL, ORIGINALS), ("litdata", ORIGINALS), 1.0),
    ("originals, against the best of webdataset", (LOCAL, ORIGINALS), ("webdataset", ORIGINALS), 1.0),
    ("256 px, against ImageFolder + PIL on originals", (LOCAL, RESIZED), ("ImageFolder", ORIGINALS, FLOAT32), 2.3),
    ("originals, S3 warm against local disk", (WARM, ORIGINALS), (LOCAL, ORIGINALS), 0.95),
    ("originals, S3 cold against warm, mid-epoch", (COLD_MID, ORIGINALS), (WARM_MID, ORIGINALS), 0.9),
)


def benchmark_data(
    work: Path, images: str | None, num_images: int, workers: Sequence[int], rounds: int, clock: str = "wall"
) -> Result:
    """Prepare the images in every format, and measure.

    Args:
        work: An empty folder for all files.
        images: A folder of images; ``None``: crops of the photographs of scikit-image and scikit-learn.
        num_images: Number of images.
        workers: Numbers of worker processes; 0 measures one process on one core.
        rounds: Number of passes that count.
        clock: ``wall``, or without workers ``cpu``: the time for which this process had a core.

    Raises:
        InputError: The images cannot be used, or are too few.
    """
    folder = work / "images"
    photos = make_photos(folder, num_images) if images is None else take_photos(images, folder, num_images)
    if photos.images < FEWEST_IMAGES:
        raise InputError(f"{images}: has {photos.images} images; at least {FEWEST_IMAGES} are needed")
    tables: list[tuple[str, Table]] = []
    targets: list[Target] = []
    with _object_store() as store:
        readers = _readers(work, photos, store)
        copies = None if store is None else _upload_copies(store, work / "originals")
        for num_workers in workers:
            setting = "one core" if num_workers == 0 else f"{num_workers} worker processes"
            with one_core() if num_workers == 0 else nullcontext():
                rows = _measure(readers, photos.images, num_workers, rounds, setting, CLOCKS[clock])
                rows += _measure_mid_epoch(copies, work / "mid-epoch", num_workers, rounds, setting, CLOCKS[clock])
            columns = {name: lambda facts, name=name: facts[name] for name in ("stored", "delivers")}
            tables.append(("rows", Table(setting, "images/s", rows, columns)))
            targets += _targets(rows, setting, num_workers)
    title = (
        f"{photos.images} JPEGs ({photos.source}), {photos.mean_width:.0f} × {photos.mean_height:.0f} px and "
        f"{photos.mean_bytes / 1000:.0f} KB on average; {clock} clock, median and range of {rounds} interleaved passes"
    )
    facts = {"photos": photos._asdict() | {"folder": None}, "clock": clock, "rounds": rounds}
    return Result(title, PACKAGES, facts, tables, targets)


def _readers(work: Path, photos: PhotoSet, store: ObjectStore | None) -> list[Reader]:
    count = photos.images
    files = sorted(photos.folder.glob("*/*.jpg"))
    a_shard = -(-count // NUM_SHARDS)
    originals = _write_shards(photos.folder, work / "originals", Encoding())
    resized = _write_shards(photos.folder, work / "resized", Encoding(SHORT_SIDE, QUALITY))
    remote = "" if store is None else _upload(store, originals)
    return [
        image_folder(photos.folder, count, FLOAT32),
        image_folder(photos.folder, count, UINT8),
        litdata_chunks(files, work / "litdata-bytes", a_shard, FLOAT32),
        litdata_chunks(files, work / "litdata-bytes", a_shard, UINT8),
        litdata_chunks(files, work / "litdata-jpeg", a_shard, UINT8, decoder="torchvision"),
        webdataset_tars(files, work / "webdataset", a_shard, FLOAT32),
        webdataset_tars(files, work / "webdataset", a_shard, UINT8),
        ours(LOCAL, ORIGINALS, originals, count),
        ours(WARM, ORIGINALS, work / "warm", count, remote),
        ours(COLD, ORIGINALS, work / "cold", count, remote, cold=True),
        decode_alone(DECODING, ORIGINALS, _stored_images(originals)),
        ours(LOCAL, RESIZED, resized, count),
        decode_alone(DECODING, RESIZED, _stored_images(resized)),
    ]


def _write_shards(images: Path, out: Path, encoding: Encoding) -> Path:
    source = find_images(images)
    num_bytes = sum(file.num_bytes for file in source.files)
    if encoding.resize:  # the same estimate as convert_images makes
        num_bytes = min(num_bytes, len(source.files) * encoding.resize**2 * 0.4)
    cores = len(os.sched_getaffinity(0))
    convert_images(source, out, encoding, workers=cores, shard_bytes=round(num_bytes / NUM_SHARDS * 1.02))
    return out


def _stored_images(folder: Path) -> list[bytes]:
    shards = read_index(folder, columns=("image",))
    return [sample["image"] for shard in shards for sample in MDSReader.from_json(str(folder), None, shard)]


@contextmanager
def _object_store() -> Iterator[ObjectStore | None]:
    """Start a server and set the environment to use it; ``None`` if it is not installed."""
    if find_server() is None:
        yield None
        return
    with ObjectStore() as store, patch.dict(os.environ, store.environment):
        yield store


def _upload(store: ObjectStore, folder: Path) -> str:
    address, client = store.create_bucket(BUCKET), store.client()
    for path in folder.iterdir():
        if path.is_file():
            client.upload_file(str(path), BUCKET, path.name)
    return address


def _upload_copies(store: ObjectStore, folder: Path) -> str:
    """Store a data set that repeats the shards of a folder, and return its address."""
    address, client = store.create_bucket(COPIES_BUCKET), store.client()
    index = json.loads((folder / "index.json").read_text())
    shards = []
    for shard in index["shards"] * COPIES:
        name = f"shard.{len(shards):05}.mds"
        client.upload_file(str(folder / shard["raw_data"]["basename"]), COPIES_BUCKET, name)
        shards.append(shard | {"raw_data": shard["raw_data"] | {"basename": name}})
    index_json = json.dumps(index | {"shards": shards}).encode()
    client.put_object(Bucket=COPIES_BUCKET, Key="index.json", Body=index_json)
    return address


def _measure(
    readers: Sequence[Reader], num_images: int, workers: int, rounds: int, setting: str, clock: Callable[[], float]
) -> list[Row]:
    passes = {"  ".join(reader[:3]): reader.start(workers) for reader in readers if reader.installed}
    rates = interleave(passes, num_images, rounds, setting, clock)
    return [_row(*reader[:3], workers, rates.get("  ".join(reader[:3]))) for reader in readers]


def _measure_mid_epoch(
    remote: str | None, cache: Path, workers: int, rounds: int, setting: str, clock: Callable[[], float]
) -> list[Row]:
    """Read an epoch with nothing cached and one with everything cached, in turns; the first of each does not count."""
    rates: Mapping[str, list[float]] = {COLD_MID: [], WARM_MID: []}
    for _ in progress_bar(range(0 if remote is None else rounds + 1), desc=f"{setting}, mid-epoch", unit="passes"):
        # Almost shard after shard, so that shards are downloaded throughout the epoch. Streaming warns of it.
        loader = our_loader(cache, remote, workers, shuffle_block_size=1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Shuffle block size was smaller than shard size")
            for each in rates.values():
                each.append(_rate_mid_epoch(loader, clock))
        del loader
        shutil.rmtree(cache)
    return [_row(name, ORIGINALS, UINT8, workers, Rates(each[1:]) if each else None) for name, each in rates.items()]


def _rate_mid_epoch(loader: DataLoader, clock: Callable[[], float]) -> float:
    batches: Iterator[dict] = iter(loader)
    for _ in islice(batches, round(SKIPPED * len(loader))):
        pass
    begin = clock()
    count = sum(len(batch["image"]) for batch in batches)
    return count / (clock() - begin)


def _row(name: str, stored: str, delivers: str, workers: int, rates: Rates | None) -> Row:
    return Row(name, rates, {"stored": stored, "delivers": delivers, "workers": workers})


def _targets(rows: Sequence[Row], setting: str, workers: int) -> Iterator[Target]:
    for what, contender, baseline, at_least in TARGETS:
        own, other = _best(rows, *contender), _best(rows, *baseline)
        ratio = None if own is None or other is None else own.ratio(other)
        yield Target(f"{setting}: {what}", ratio, at_least, workers)


def _best(rows: Sequence[Row], name: str, stored: str, delivers: str = "") -> Rates | None:
    """Return the fastest rates of a contender, with any decoder."""
    rates = [
        row.rates
        for row in rows
        if row.rates is not None
        and row.name.split(" + ")[0] == name
        and row.facts["stored"] == stored
        and delivers in (row.facts["delivers"], "")
    ]
    return max(rates, key=lambda each: each.median, default=None)
