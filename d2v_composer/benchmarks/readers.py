"""Readers of training images, ours and others, each for a torch DataLoader with batches of 64.

Each of the others is set up as in its documentation, and delivers what is usual there (float32, normalised) or what
ours delivers (uint8, normalised later on the device). All shuffle and augment alike: RandomResizedCrop to 224 px with
scale (0.08, 1), bicubic, and a flip with probability 0.5.
"""

import io
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from d2v_composer.benchmarks.measure import Pass
from d2v_composer.data.augmentation import RandomResizedCropFlip, sample_rng
from d2v_composer.data.streaming_images import StreamingImages

__all__ = [
    "FLOAT32",
    "ORIGINALS",
    "RESIZED",
    "UINT8",
    "Reader",
    "decode_alone",
    "image_folder",
    "litdata_chunks",
    "our_loader",
    "ours",
    "webdataset_tars",
]

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
    """float32 (normalised) or uint8."""
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
    return DataLoader(dataset, BATCH_SIZE, **_in_processes(workers))


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
    normalise = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return transforms.Compose(augment + (normalise if delivers == FLOAT32 else [transforms.PILToTensor()]))


def _augment_tensor(delivers: str) -> Augmentation:
    augment = [
        v2.RandomResizedCrop(IMAGE_SIZE, (0.08, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(),
    ]
    normalise = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    return v2.Compose(augment + (normalise if delivers == FLOAT32 else []))


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
