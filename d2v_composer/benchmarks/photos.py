"""Write photographs as JPEGs of ImageNet's sizes: crops that need no network, or the images of a folder."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from d2v_composer.conversion.image_source import find_images
from d2v_composer.conversion.rgb_jpeg import as_rgb_jpeg
from d2v_composer.system.errors import InputError
from d2v_composer.system.packages import install_command

__all__ = ["PhotoSet", "make_photos", "take_photos"]

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
QUALITY = 99
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
        _random_crop(photos[name], width, height, rng).save(path, "JPEG", quality=QUALITY, subsampling="4:2:0")
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
        encoded, _ = as_rgb_jpeg(encoded, str(images.root / file.path), resize=None, quality=95)
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
