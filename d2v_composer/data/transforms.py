"""From an encoded image to the pixels that a model sees, as a function of an explicit random generator.

The training recipe of data2vec 2.0: random resized crop with scale (0.08, 1), ratio 3/4 to 4/3, bicubic, and a
horizontal flip with probability 0.5. Pixels stay uint8: normalising is the model's business, on its device.
"""

import io
import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d2v_composer.errors import InputError

__all__ = ["Box", "RandomResizedCropFlip", "decode_rgb", "random_crop_box", "sample_rng", "to_tensor"]

CROP_ATTEMPTS = 10


class Box(NamedTuple):
    """A rectangle of an image, in pixels: left ≤ x < right, top ≤ y < bottom."""

    left: int
    top: int
    right: int
    bottom: int


def sample_rng(seed: int, epoch: int, sample_id: int) -> np.random.Generator:
    """The randomness of one sample in one epoch: the same for any number of ranks, workers and restarts."""
    return np.random.default_rng((seed, epoch, sample_id))


def decode_rgb(encoded: bytes, source: str) -> Image.Image:
    """Decode an image of any kind to RGB.

    Args:
        encoded: The file's bytes.
        source: Named in the error.

    Raises:
        InputError: The bytes are no image, or a damaged one.
    """
    try:
        return Image.open(io.BytesIO(encoded)).convert("RGB")
    except Exception as error:
        raise InputError(f"{source}: not an image that can be read ({len(encoded)} bytes)") from error


def to_tensor(image: Image.Image) -> Tensor:
    """(3, height, width) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def random_crop_box(
    width: int, height: int, rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """A box of random area and aspect ratio (Szegedy et al. 2015, arXiv:1409.4842, section 6).

    Args:
        width: The image's, in pixels.
        height: Likewise.
        rng: Where the randomness comes from.
        scale: The smallest and largest share of the image's area.
        ratio: The narrowest and widest width over height; drawn evenly in its logarithm.

    Returns:
        The first of ten draws that fits, or the largest box in the centre whose ratio is allowed.
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

    image_size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """(3, image_size, image_size) uint8, of an RGB image."""
        box = random_crop_box(*image.size, rng, self.scale, self.ratio)
        # Cropping first, not resize(box=...): the filter must not see pixels outside of the crop.
        crop = image.crop(box).resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        if rng.random() < self.flip:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(crop)
