"""Random crops and flips, as a function of (seed, epoch, sample id) alone."""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn import functional

from d2v_composer.data.decode import Box, CuttableJpeg, _to_tensor, decode_rgb

__all__ = ["CROP_ATTEMPTS", "RandomResizedCropFlip", "random_crop_box", "sample_rng"]

CROP_ATTEMPTS = 10


def sample_rng(seed: int, epoch: int, sample_id: int) -> np.random.Generator:
    """The randomness of one sample in one epoch: the same for any number of ranks, workers and restarts."""
    return np.random.default_rng((seed, epoch, sample_id))


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

    def __call__(self, image: bytes | Image.Image, rng: np.random.Generator, source: str = "image") -> Tensor:
        """Augment one image.

        Args:
            image: An image file's bytes, or an image in RGB.
            rng: Where the randomness comes from.
            source: Named in the error.

        Returns:
            (3, image_size, image_size) uint8.

        Raises:
            UnreadableImageError: The bytes are no image, or a damaged one.
        """
        whole = CuttableJpeg.parse(image, source) or decode_rgb(image, source) if isinstance(image, bytes) else image
        box = random_crop_box(*whole.size, rng, self.scale, self.ratio)
        crop = whole.crop(box) if isinstance(whole, CuttableJpeg) else np.array(whole.crop(box))
        # Torch's filter is Pillow's with weights of 16 bits, not 22: a fifth of the time, and hardly a value differs by
        # one. Cropping comes first, as the filter must not see pixels outside of the crop.
        size = (self.image_size, self.image_size)
        pixels = functional.interpolate(_to_tensor(crop)[None], size, mode="bicubic", antialias=True)[0]
        return pixels.flip(-1) if rng.random() < self.flip else pixels
