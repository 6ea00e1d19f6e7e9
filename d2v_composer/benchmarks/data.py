"""Measure the images per second of this package's training loader, and of a loader with torchvision's ImageFolder.

A pass is an epoch, in which each loader delivers all images.
"""

import random
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from streaming import MDSWriter
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from d2v_composer.benchmarks import interleave, one_core, result_of
from d2v_composer.data.images import Images, RandomResizedCropFlip
from d2v_composer.models.provenance import Record
from d2v_composer.sources.mds import Index
from d2v_composer.sources.shards import fetch_index
from d2v_composer.system.errors import reading
from d2v_composer.training_data.sampler import StreamingSamples

BATCH_SIZE, IMAGE_SIZE, SEED = 64, 224, 17
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUM_SHARDS = 8  # with about the same number of images
IMAGE_FOLDER = "ImageFolder + PIL"
LOCAL, WARM = "ours, local disk", "ours, S3 warm"

# ImageNet's most common sizes and their shares. Crops of sharp photographs have ImageNet's 110 KB at this quality.
SIZES = {(500, 375): 0.50, (375, 500): 0.16, (500, 333): 0.16, (333, 500): 0.06, (400, 300): 0.06, (300, 300): 0.06}
QUALITY = 99
MIN_CROP = 0.6  # side, as a share of the largest crop's


def benchmark(
    *,
    images: Path | None,
    num_images: int,
    workers: int,
    remote: str | None,
    repeats: int,
) -> Record:
    """Measure the images per second of each loader; the arguments are the options of ``d2v benchmark data``.

    Raises:
        InputError: The folder cannot be read.
    """
    with TemporaryDirectory(ignore_cleanup_errors=True) as name:
        work = Path(name)
        folder = images or make_photos(work / "images", num_images)
        with reading(folder):
            dataset = ImageFolder(str(folder), augment())
        chosen = random.Random(0).sample(range(len(dataset)), min(num_images, len(dataset)))
        originals = [Path(dataset.samples[i][0]).read_bytes() for i in chosen]
        options = {"batch_size": BATCH_SIZE, "num_workers": workers, "persistent_workers": workers > 0}
        write_shards(originals, str(work / "shards"))
        loaders = {
            IMAGE_FOLDER: DataLoader(Subset(dataset, chosen), shuffle=True, **options),
            LOCAL: build_ours(work / "shards", None, options),
        }
        compared = [(LOCAL, IMAGE_FOLDER)]
        if remote is not None:
            write_shards(originals, remote)
            loaders[WARM] = build_ours(work / "cache", remote, options)
            compared.append((WARM, LOCAL))
        passes = {program: (partial(take_all, loader, len(chosen)), len(chosen)) for program, loader in loaders.items()}
        with one_core() if workers == 0 else nullcontext():
            rates = interleave(passes, repeats)
    setting = {
        "images": len(chosen),
        "source": "crops of scikit-image's photographs" if images is None else str(images),
        "kilobytes_per_image": round(sum(map(len, originals)) / len(originals) / 1e3, 1),
        "workers": workers,
        "repeats": repeats,
    }
    return result_of(setting, "images/s", rates, compared)


def make_photos(folder: Path, num_images: int) -> Path:
    """Write random crops of scikit-image's photographs as JPEGs in one class folder; return ``folder``."""
    from skimage import data

    arrays = (data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.stereo_motorcycle()[0])
    photographs, one_class = [Image.fromarray(array) for array in arrays], folder / "photographs"
    one_class.mkdir(parents=True)
    for i in range(num_images):
        rng = random.Random(i)
        photo, [(width, height)] = photographs[i % len(photographs)], rng.choices([*SIZES], [*SIZES.values()])
        scale = min(photo.width / width, photo.height / height) * rng.uniform(MIN_CROP, 1)
        left, top = rng.uniform(0, photo.width - width * scale), rng.uniform(0, photo.height - height * scale)
        box = (left, top, left + width * scale, top + height * scale)
        crop = photo.resize((width, height), Image.Resampling.BICUBIC, box)
        crop.save(one_class / f"{i:06}.jpg", quality=QUALITY, subsampling="4:2:0")
    return folder


def write_shards(images: list[bytes], out: str) -> None:
    size = sum(map(len, images)) // NUM_SHARDS + 1
    with MDSWriter(out=out, columns={"image": "bytes"}, size_limit=size, hashes=["xxh64"], progress_bar=False) as mds:
        for image in images:
            mds.write({"image": image})


def build_ours(local: Path, remote: str | None, options: dict[str, Any]) -> DataLoader:
    """Return this package's loader of shards in ``local``, or in the store ``remote`` with the cache ``local``."""
    if remote is not None:
        fetch_index(remote, local)
    index = Index(local, Images(), remote=remote)
    dataset = StreamingSamples(index, RandomResizedCropFlip(IMAGE_SIZE), seed=SEED)
    return DataLoader(dataset, sampler=dataset.order, **options)


def augment() -> Callable[..., Tensor]:
    """Return the usual training augmentation for ImageNet, from PIL images to normalized tensors."""
    bicubic = transforms.InterpolationMode.BICUBIC
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(IMAGE_SIZE, (0.08, 1.0), interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def take_all(loader: Iterable, num_images: int) -> None:
    """Read every batch of one epoch.

    Raises:
        RuntimeError: The loader does not deliver ``num_images`` images of the expected size.
    """
    count, images = 0, torch.empty(0)
    for batch in loader:
        images = batch["image"] if isinstance(batch, dict) else batch[0]
        count += len(images)
    if (count, *images.shape[1:]) != (num_images, 3, IMAGE_SIZE, IMAGE_SIZE):
        raise RuntimeError(
            f"expected {num_images} images of {IMAGE_SIZE} x {IMAGE_SIZE} pixels, got {count} images; "
            f"shape of the last batch: {tuple(images.shape)}"
        )
