"""Random crops and flips that depend on (seed, epoch, sample id) alone.

The training recipe of data2vec 2.0: a random resized crop with scale (0.08, 1) and ratio 3/4 to 4/3, bicubic, and a
horizontal flip with probability 0.5.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn import functional

from d2v_composer.data.decode import Box, CuttableJpeg, rgb_of, to_tensor
from d2v_composer.models.sizes import ImageSize, height_and_width

__all__ = ["CROP_ATTEMPTS", "RandomResizedCropFlip", "random_crop_box", "sample_rng"]

CROP_ATTEMPTS = 10


def sample_rng(seed: int, epoch: int, sample_id: int) -> np.random.Generator:
    """Return the random generator of one sample in one epoch."""
    return np.random.default_rng((seed, epoch, sample_id))


def random_crop_box(
    width: int, height: int, rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Draw a box of random area and aspect ratio (Szegedy et al. 2015, arXiv:1409.4842, section 6).

    Args:
        width: The image's width, in pixels.
        height: The image's height, in pixels.
        rng: The random generator.
        scale: The smallest and largest share of the image's area.
        ratio: The smallest and largest width over height; its logarithm is drawn uniformly.

    Returns:
        The first of ten draws that fits into the image, or the largest box in the centre whose ratio is allowed.
    """
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(CROP_ATTEMPTS):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(rng.integers(width - crop_width + 1))
            top = int(rng.integers(height - crop_height + 1))
            return Box(left, top, left + crop_width, top + crop_height)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    crop_width, crop_height = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return Box(left, top, left + crop_width, top + crop_height)


class RandomResizedCropFlip(NamedTuple):
    """The training augmentation of one image."""

    image_size: ImageSize
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    interpolation: str = "bicubic"

    def __call__(self, image: bytes | Image.Image, rng: np.random.Generator, source: str = "image") -> Tensor:
        """Augment one image.

        Args:
            image: An image file's bytes, or a decoded image.
            rng: The random generator.
            source: The image's name for errors.

        Returns:
            (3, height, width) uint8.

        Raises:
            UnreadableImageError: The image cannot be decoded.
        """
        jpeg = CuttableJpeg.parse(image, source) if isinstance(image, bytes) else None
        whole = jpeg or rgb_of(image, source)
        box = random_crop_box(*whole.size, rng, self.scale, self.ratio)
        # Torch's filter is Pillow's with weights of 16 instead of 22 bits: five times as fast, and few values differ,
        # by one. Cropping comes first, because the filter must not see pixels outside of the crop.
        crop, size = to_tensor(whole.crop(box))[None], height_and_width(self.image_size)
        pixels = functional.interpolate(crop, size, mode=self.interpolation, antialias=True)[0]
        return pixels.flip(-1) if rng.random() < self.flip else pixels
