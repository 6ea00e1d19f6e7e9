"""Measure how fast training images arrive: ours, torchvision's ImageFolder and litdata, from the same photographs.

Every contender reads all images in every pass and delivers them in batches through a torch DataLoader. A pass is a
whole epoch; worker processes persist between passes. After the warm-up pass, all files are in the page cache.
"""

import io
import os
import random
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from streaming import MDSWriter
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from d2v_composer.benchmarks.measure import Result, interleave, one_core, ratio
from d2v_composer.data.images import RandomResizedCropFlip
from d2v_composer.data.streaming import StreamingImages
from d2v_composer.system.errors import InputError, reading

BATCH_SIZE, IMAGE_SIZE, SEED = 64, 224, 17
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHORT_SIDE, QUALITY = 256, 90
NUM_SHARDS = 8  # of each format, with about as many images each
IMAGE_FOLDER, LITDATA = "ImageFolder + PIL", "litdata + PIL"
LOCAL, RESIZED, WARM = "ours, local disk", "ours, 256-px shards", "ours, S3 warm"

# ImageNet's most common sizes and their shares. Crops of sharp photographs have ImageNet's 110 KB at this quality.
SIZES = {(500, 375): 0.50, (375, 500): 0.16, (500, 333): 0.16, (333, 500): 0.06, (400, 300): 0.06, (300, 300): 0.06}
PHOTO_QUALITY = 99
SMALLEST_CROP = 0.6  # side, as a share of the largest crop's
NUM_CLASSES = 10

Pass = Callable[[], None]


def benchmark_data(
    work: Path, images: Path | None, num_images: int, workers: int, rounds: int, remote: str | None
) -> Result:
    """Write the images in every format, and measure images per second.

    Args:
        work: An empty folder for all files.
        images: A folder of images, searched recursively; ``None``: crops of scikit-image's photographs.
        num_images: Images to read.
        workers: Worker processes; 0 measures one process with all its threads on one core.
        rounds: Measured passes of each contender.
        remote: An address to write shards to and to read them from, such as an empty s3://BUCKET/PREFIX.

    Raises:
        InputError: A photograph cannot be read.
    """
    photos = Photos.make(work / "images", num_images) if images is None else Photos.take(images, work, num_images)
    originals = [path.read_bytes() for path in photos.files]
    write_shards(originals, str(work / "originals"))
    write_shards([shrink(each) for each in originals], str(work / "resized"))
    passes = {
        IMAGE_FOLDER: image_folder(photos, workers),
        LITDATA: litdata_chunks(photos, work / "litdata", workers),
        LOCAL: ours(work / "originals", None, len(originals), workers),
        RESIZED: ours(work / "resized", None, len(originals), workers),
    }
    if remote is not None:
        write_shards(originals, remote)
        passes[WARM] = ours(work / "warm", remote, len(originals), workers)
    with one_core() if workers == 0 else nullcontext():
        rates = {name: each * len(originals) for name, each in interleave(passes, rounds).items()}
    place = "one core" if workers == 0 else f"{workers} workers"
    kilobytes = np.mean([len(each) for each in originals]) / 1e3
    ratios: list[tuple[str, float, float | None]] = [
        ("local disk ÷ ImageFolder + PIL", ratio(rates[LOCAL], rates[IMAGE_FOLDER]), 2.0)
    ]
    if remote is not None:
        ratios.append(("S3 warm ÷ local disk", ratio(rates[WARM], rates[LOCAL]), 0.95))
    return Result(
        title=f"{len(originals)} JPEGs of {kilobytes:.0f} KB ({photos.source}), {place}, {rounds} interleaved rounds",
        unit="images/s",
        setting={"images": len(originals), "source": photos.source, "workers": workers, "rounds": rounds},
        rates=rates,
        ratios=ratios,
        packages=("torch", "torchvision", "pillow", "simplejpeg", "mosaicml-streaming", "litdata"),
    )


class Photos(NamedTuple):
    """RGB JPEGs in class folders."""

    folder: Path
    source: str

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*/*.jpg"))

    @classmethod
    def make(cls, folder: Path, num_images: int) -> "Photos":
        """Write random crops of scikit-image's photographs, in ImageNet's sizes. They need no network."""
        from skimage import data

        arrays = (data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.stereo_motorcycle()[0])
        photographs = [Image.fromarray(each) for each in arrays]
        for i in range(num_images):
            rng = random.Random(i)
            photo, [(width, height)] = photographs[i % len(photographs)], rng.choices([*SIZES], [*SIZES.values()])
            scale = min(photo.width / width, photo.height / height) * rng.uniform(SMALLEST_CROP, 1)
            left, top = rng.uniform(0, photo.width - width * scale), rng.uniform(0, photo.height - height * scale)
            box = (left, top, left + width * scale, top + height * scale)
            save(photo.resize((width, height), Image.Resampling.BICUBIC, box), folder, i, PHOTO_QUALITY)
        return cls(folder, "crops of scikit-image's photographs")

    @classmethod
    def take(cls, source: Path, work: Path, num_images: int) -> "Photos":
        """Copy random images of a folder; those that are not RGB JPEGs are converted."""
        folder, suffixes = work / "images", Image.registered_extensions()
        paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in suffixes)
        if not paths:
            raise InputError(f"{source}: no images")
        for i, path in enumerate(random.Random(0).sample(paths, min(num_images, len(paths)))):
            with reading(path), Image.open(path) as image:
                if (image.format, image.mode) == ("JPEG", "RGB"):
                    save(path.read_bytes(), folder, i)
                else:
                    save(image.convert("RGB"), folder, i)
        return cls(folder, str(source))


def save(image: Image.Image | bytes, folder: Path, number: int, quality: int = 95) -> None:
    """Write a JPEG into one of the class folders."""
    path = folder / f"class{number % NUM_CLASSES}" / f"{number:06}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image if isinstance(image, bytes) else encode(image, quality))


def encode(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def shrink(encoded: bytes) -> bytes:
    """Shrink a JPEG's short side to ``SHORT_SIDE`` pixels, as ``d2v convert-images --resize`` does."""
    with Image.open(io.BytesIO(encoded)) as image:
        scale = min(1.0, SHORT_SIDE / min(image.size))
        size = round(image.width * scale), round(image.height * scale)
        return encode(image.resize(size, Image.Resampling.BICUBIC), QUALITY)


def write_shards(images: list[bytes], out: str) -> None:
    size = sum(map(len, images)) // NUM_SHARDS + 1
    with MDSWriter(out=out, columns={"image": "bytes"}, size_limit=size, hashes=["xxh64"], progress_bar=False) as mds:
        for image in images:
            mds.write({"image": image})


def ours(local: Path, remote: str | None, num_images: int, workers: int) -> Pass:
    """Return a pass over our shards; with ``remote``, ``local`` is the cache."""
    transform = RandomResizedCropFlip(IMAGE_SIZE)
    dataset = StreamingImages(local=local, remote=remote, batch_size=BATCH_SIZE, transform=transform, seed=SEED)
    return partial(
        take_all,
        DataLoader(dataset, BATCH_SIZE, sampler=dataset.order, **in_processes(workers)),
        torch.uint8,
        num_images,
    )


def image_folder(photos: Photos, workers: int) -> Pass:
    dataset = ImageFolder(str(photos.folder), augment())
    loader = DataLoader(dataset, BATCH_SIZE, shuffle=True, **in_processes(workers))
    return partial(take_all, loader, torch.float32, len(dataset))


def litdata_chunks(photos: Photos, out: Path, workers: int) -> Pass:
    os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"  # it asks PyPI
    for variable in ("DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER"):
        os.environ[variable] = f"{out}.cache"
    from litdata import StreamingDataLoader, StreamingDataset, optimize

    files = [str(path) for path in photos.files]
    chunks = {"chunk_size": -(-len(files) // NUM_SHARDS), "num_workers": 1, "start_method": "fork", "verbose": False}
    optimize(litdata_sample, files, output_dir=str(out), optimize_dns=False, **chunks)
    dataset = StreamingDataset(str(out), shuffle=True, seed=SEED, transform=partial(litdata_image, augment()))
    loader = StreamingDataLoader(dataset, batch_size=BATCH_SIZE, **in_processes(workers))
    return partial(take_all, loader, torch.float32, len(files))


def litdata_sample(path: str) -> dict[str, Any]:
    return {"image": Path(path).read_bytes(), "label": 0}


def litdata_image(transform: Callable[[Any], Tensor], sample: dict[str, Any], *_: Any) -> tuple[Tensor, int]:
    return transform(Image.open(io.BytesIO(sample["image"])).convert("RGB")), sample["label"]


def augment() -> Callable[[Any], Tensor]:
    """Return the usual transform of PIL's images, as every tutorial has it."""
    bicubic = transforms.InterpolationMode.BICUBIC
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(IMAGE_SIZE, (0.08, 1.0), interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def in_processes(workers: int) -> dict[str, Any]:
    return {"num_workers": workers, "persistent_workers": workers > 0}


def take_all(loader: Iterable[Any], dtype: torch.dtype, num_images: int) -> None:
    """Read one epoch.

    Raises:
        RuntimeError: The images are not those that the contender should deliver.
    """
    count, images = 0, torch.empty(0)
    for batch in loader:
        images = batch["image"] if isinstance(batch, dict) else batch[0]
        count += len(images)
    if (count, *images.shape[1:], images.dtype) != (num_images, 3, IMAGE_SIZE, IMAGE_SIZE, dtype):
        found = f"{count} images, the last batch {tuple(images.shape)} of {images.dtype}"
        raise RuntimeError(f"expected {num_images} images of {dtype}, got {found}")
