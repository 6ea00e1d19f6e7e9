"""How fast training images come: ours and others from the same photographs, interleaved, in one process.

Every contender reads all images in every pass, and delivers them in batches through a torch DataLoader. Passes are
whole epochs, from asking for the first batch to the last: with what starting an epoch costs, without what starting a
process costs (worker processes stay from pass to pass). The first pass of each does not count, so files are in the
page cache; the rows "going on" are measured otherwise (going_on.py). "One core" is this process with all its threads on
one core; the object store is another process, and free to use others. With worker processes nothing is tied to a core.

On a machine that does other things at the same time, the CPU clock gives steadier numbers of one core. It leaves out
waiting: for the object store, when its cache is cold.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from streaming.base.format.mds import MDSReader

from d2v_composer.benchmarks.going_on import measure_going_on, upload_copies
from d2v_composer.benchmarks.measure import (
    Rates,
    Target,
    describe_setting,
    interleave,
    one_core,
    progress_bar,
    versions,
)
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
    ours,
    ours_cold,
    webdataset_tars,
)
from d2v_composer.conversion.convert import convert_images
from d2v_composer.conversion.image_source import find_images
from d2v_composer.conversion.shards import Encoding
from d2v_composer.data.mds_index import read_index
from d2v_composer.system.errors import InputError
from d2v_composer.system.machine_info import describe_machine

__all__ = ["CLOCKS", "FEWEST_IMAGES", "DataBenchmark", "Row", "benchmark_data"]

FEWEST_IMAGES = 32
NUM_SHARDS = 8  # of about as many images each, for every format, so that workers have equal shares
SHORT_SIDE, QUALITY = 256, 90
BUCKET, COPIES_BUCKET = "benchmark", "copies"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "simplejpeg", "mosaicml-streaming", "litdata", "webdataset")

BASELINE = "ImageFolder + PIL"
LOCAL, WARM, COLD, DECODING = "ours, local disk", "ours, S3 warm", "ours, S3 cold", "ours, decoding alone"
GOING_ON = "ours, S3 cold, going on", "ours, S3 warm, going on"


class Row(NamedTuple):
    """What was measured of one contender."""

    name: str
    stored: str
    delivers: str
    workers: int
    rates: Rates | None
    """Images a second; ``None``: not installed."""


class DataBenchmark(NamedTuple):
    """The whole measurement."""

    photos: PhotoSet
    clock: str
    machine: dict[str, str | int]
    versions: dict[str, str | None]
    rounds: int
    rows: list[Row]
    targets: dict[int, list[Target]]
    """By number of workers."""

    def as_json(self) -> dict[str, Any]:
        rows = [
            row._asdict()
            | {
                "rates": None if row.rates is None else row.rates.each,
                "median": None if row.rates is None else row.rates.median,
                "ratio_to_baseline": _ratio(self.rows, row),
            }
            for row in self.rows
        ]
        photos = self.photos._asdict() | {"folder": None}  # it is gone by then
        targets = [
            {"workers": workers} | target._asdict() for workers, targets in self.targets.items() for target in targets
        ]
        return self._asdict() | {"photos": photos, "rows": rows, "targets": targets}

    def as_text(self) -> str:
        """What was measured, where, and which targets are reached."""
        photos = self.photos
        lines = [
            *describe_setting(self.machine, self.versions),
            f"{photos.images} JPEGs ({photos.source}): on average {photos.mean_width:.0f} × {photos.mean_height:.0f} "
            f"px, {photos.mean_bytes / 1000:.0f} KB",
            f"Images a second ({self.clock} clock): median and range of {self.rounds} passes over all images, "
            f"interleaved; × is the ratio to {BASELINE} with {FLOAT32}, median of the rounds'",
        ]
        for workers, targets in self.targets.items():
            lines += ["", *_table([row for row in self.rows if row.workers == workers], workers)]
            lines += [target.verdict for target in targets]
        return "\n".join(lines)


def benchmark_data(
    work: Path, images: str | None, num_images: int, workers: Sequence[int], rounds: int, clock: str = "wall"
) -> DataBenchmark:
    """Make or take the images, store them in every format, and measure.

    Args:
        work: An empty folder for all of it.
        images: A folder of images, or ``None``: crops of photographs that come with scikit-image and scikit-learn.
        num_images: How many.
        workers: Numbers of worker processes; 0 measures in one process, on one core.
        rounds: How many passes of each count.
        clock: ``wall``, or ``cpu``: the time that this process had a core, where others use it too; without workers.

    Raises:
        InputError: The images cannot be used, or are too few.
    """
    folder = work / "images"
    photos = make_photos(folder, num_images) if images is None else take_photos(images, folder, num_images)
    if photos.images < FEWEST_IMAGES:
        raise InputError(f"{images}: has {photos.images} images; needed are {FEWEST_IMAGES}")
    rows: list[Row] = []
    with _object_store() as store:
        readers = _readers(work, photos, store)
        copies = None if store is None else upload_copies(store, work / "originals", COPIES_BUCKET)
        for num_workers in workers:
            rows += _measure(readers, photos.images, num_workers, rounds, clock)
            rows += _measure_going_on(copies, work / "going-on", num_workers, rounds, clock)
    targets = {num_workers: _targets(rows, num_workers) for num_workers in workers}
    return DataBenchmark(photos, clock, describe_machine(), versions(*PACKAGES), rounds, rows, targets)


def _readers(work: Path, photos: PhotoSet, store: ObjectStore | None) -> list[Reader]:
    count = photos.images
    files = sorted(photos.folder.glob("*/*.jpg"))
    a_share = -(-count // NUM_SHARDS)
    originals = _write_shards(photos.folder, work / "originals", Encoding())
    resized = _write_shards(photos.folder, work / "resized", Encoding(SHORT_SIDE, QUALITY))
    remote = "" if store is None else _upload(store, originals)
    return [
        image_folder(photos.folder, count, FLOAT32),
        image_folder(photos.folder, count, UINT8),
        litdata_chunks(files, work / "litdata-bytes", a_share, FLOAT32),
        litdata_chunks(files, work / "litdata-bytes", a_share, UINT8),
        litdata_chunks(files, work / "litdata-jpeg", a_share, UINT8, tensors=True),
        webdataset_tars(files, work / "webdataset", a_share, FLOAT32),
        webdataset_tars(files, work / "webdataset", a_share, UINT8),
        ours(LOCAL, ORIGINALS, originals, count),
        ours(WARM, ORIGINALS, work / "warm", count, remote)._replace(installed=store is not None),
        ours_cold(COLD, ORIGINALS, work / "cold", count, remote)._replace(installed=store is not None),
        decode_alone(DECODING, ORIGINALS, _stored_images(originals)),
        ours(LOCAL, RESIZED, resized, count),
        decode_alone(DECODING, RESIZED, _stored_images(resized)),
    ]


def _write_shards(images: Path, out: Path, encoding: Encoding) -> Path:
    source = find_images(images)
    num_bytes = sum(file.num_bytes for file in source.files)
    if encoding.resize:  # what convert_images thinks that they will have
        num_bytes = min(num_bytes, len(source.files) * encoding.resize**2 * 0.4)
    cores = len(os.sched_getaffinity(0))
    convert_images(source, out, encoding, workers=cores, shard_bytes=round(num_bytes / NUM_SHARDS * 1.02))
    return out


def _stored_images(folder: Path) -> list[bytes]:
    shards = read_index(folder, columns=("image",))
    return [sample["image"] for shard in shards for sample in MDSReader.from_json(str(folder), None, shard)]


@contextmanager
def _object_store() -> Iterator[ObjectStore | None]:
    """A server of this process's own, and the environment set to use it; ``None`` where none is installed."""
    if find_server() is None:
        yield None
        return
    with ObjectStore() as store:
        before = {name: os.environ.get(name) for name in store.environment}
        os.environ.update(store.environment)
        try:
            yield store
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def _upload(store: ObjectStore, folder: Path) -> str:
    address, client = store.create_bucket(BUCKET), store.client()
    for path in folder.iterdir():
        if path.is_file():
            client.upload_file(str(path), BUCKET, path.name)
    return address


def _measure(readers: Sequence[Reader], num_images: int, workers: int, rounds: int, clock: str) -> list[Row]:
    present = {"  ".join(reader[:3]): reader for reader in readers if reader.installed}
    with ExitStack() as stack:
        progress = stack.enter_context(progress_bar(_setting(workers), len(present) * (rounds + 1)))
        stack.enter_context(one_core() if workers == 0 else nullcontext())
        passes = {name: stack.enter_context(reader.start(workers)) for name, reader in present.items()}
        rates = interleave(passes, num_images, rounds, progress, CLOCKS[clock])
    return [Row(*reader[:3], workers, rates.get("  ".join(reader[:3]))) for reader in readers]


def _measure_going_on(remote: str | None, cache: Path, workers: int, rounds: int, clock: str) -> list[Row]:
    rates: tuple[Rates | None, Rates | None] = None, None
    if remote is not None:
        with (
            progress_bar(f"{_setting(workers)}, going on", 2 * (rounds + 1)) as progress,
            one_core() if workers == 0 else nullcontext(),
        ):
            rates = measure_going_on(remote, cache / f"{workers} workers", workers, rounds, progress, CLOCKS[clock])
    return [Row(name, ORIGINALS, UINT8, workers, each) for name, each in zip(GOING_ON, rates, strict=True)]


def _targets(rows: Sequence[Row], workers: int) -> list[Target]:
    rows = [row for row in rows if row.workers == workers]
    baseline = _best(rows, BASELINE, ORIGINALS, FLOAT32)
    own, warm = _best(rows, LOCAL, ORIGINALS), _best(rows, WARM, ORIGINALS)
    comparisons = [
        ("originals, against ImageFolder + PIL", own, baseline, 1.25),
        ("originals, against the best of litdata", own, _best(rows, "litdata", ORIGINALS), 1.0),
        ("originals, against the best of webdataset", own, _best(rows, "webdataset", ORIGINALS), 1.0),
        ("256 px, against ImageFolder + PIL on originals", _best(rows, LOCAL, RESIZED), baseline, 2.3),
        ("originals, S3 warm against local disk", warm, own, 0.95),
        ("originals, S3 cold against warm, going on", *(_best(rows, name, ORIGINALS) for name in GOING_ON), 0.9),
    ]
    return [
        Target(what, None if rates is None or other is None else rates.ratio(other), at_least)
        for what, rates, other, at_least in comparisons
    ]


def _best(rows: Sequence[Row], name: str, stored: str, delivers: str = "") -> Rates | None:
    """The fastest of the rows whose names begin so."""
    candidates = [
        row.rates
        for row in rows
        if row.rates is not None
        and row.name.startswith(name)
        and row.stored == stored
        and delivers in (row.delivers, "")
    ]
    return max(candidates, key=lambda rates: rates.median, default=None)


def _table(rows: list[Row], workers: int) -> Iterator[str]:
    yield f"{_setting(workers):24}  {'reads':9}  {'delivers':8}  {'images/s':>8}  {'range':>13}  {'×':>5}"
    for row in rows:
        start = f"{row.name:24}  {row.stored:9}  {row.delivers:8}"
        if row.rates is None:
            yield f"{start}  not installed"
            continue
        extent = f"{min(row.rates.each):.0f} – {max(row.rates.each):.0f}"
        yield f"{start}  {row.rates.median:8.0f}  {extent:>13}  {_ratio(rows, row):5.2f}"


def _ratio(rows: Sequence[Row], row: Row) -> float | None:
    """To the baseline with as many workers."""
    baseline = _best([other for other in rows if other.workers == row.workers], BASELINE, ORIGINALS, FLOAT32)
    return None if row.rates is None or baseline is None else row.rates.ratio(baseline)


def _setting(workers: int) -> str:
    return "one core" if workers == 0 else f"{workers} worker processes"
