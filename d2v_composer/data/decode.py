"""Decode images to the pixels that a model sees.

Pixels stay uint8: the model normalises them on its device.
"""

import io
import struct
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from d2v_composer.models.sizes import ImageSize, height_and_width
from d2v_composer.system.errors import UnreadableImageError

__all__ = [
    "Box",
    "CuttableJpeg",
    "decode_rgb",
    "is_of_machine",
    "open_image",
    "resized",
    "rgb_of",
    "to_rgb",
    "to_tensor",
]

# Formats that Pillow decodes without other programs; for some it would run Ghostscript on an untrusted file.
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP")
# Load Pillow's decoders now: without free file descriptors, Pillow takes a decoder that it cannot load for missing.
Image.init()


class Box(NamedTuple):
    """A rectangle of an image, in pixels: left ≤ x < right, top ≤ y < bottom."""

    left: int
    top: int
    right: int
    bottom: int


def decode_rgb(encoded: bytes, source: str) -> Image.Image:
    """Decode an image file to RGB; of an animation, the first frame.

    Args:
        encoded: The file's bytes.
        source: The image's name for errors.

    Raises:
        UnreadableImageError: The bytes are not an image, are corrupt, or have more than ``PIL.Image.MAX_IMAGE_PIXELS``.
            A fault of the machine is raised as it is.
    """
    try:
        return to_rgb(open_image(encoded))
    except ImageSizeError as error:
        raise UnreadableImageError(f"{source}: {error}") from error
    except Exception as error:
        if is_of_machine(error):
            raise
        raise UnreadableImageError(f"{source}: not an image that can be read ({len(encoded)} bytes)") from error


def is_of_machine(error: BaseException) -> bool:
    """Return True if decoding failed because memory or file descriptors ran out; Pillow's own errors have no number."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)


def rgb_of(stored: bytes | Image.Image, source: str) -> Image.Image:
    """Return a value of an image column in RGB: a file's bytes, or pixels (of the encoding ``pil``).

    Raises:
        UnreadableImageError: As :func:`decode_rgb`.
    """
    if not isinstance(stored, Image.Image):
        return decode_rgb(stored, source)
    try:
        return to_rgb(stored)
    except ValueError as error:
        raise UnreadableImageError(f"{source}: not an image that can be read ({error})") from error


class ImageSizeError(ValueError):
    """An image would take too much memory."""


def open_image(encoded: bytes) -> Image.Image:
    """Read the header of an image file.

    Raises:
        ImageSizeError: The image has too many pixels. Pillow alone would warn, and decode twice as many.
    """
    limit = Image.MAX_IMAGE_PIXELS
    try:
        image = Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageSizeError(f"has more than {limit} pixels") from error
    if limit is not None and image.width * image.height > limit:
        raise ImageSizeError(f"has {image.width} x {image.height} pixels, more than {limit}")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an image to RGB; 16-bit values become 8-bit ones.

    Raises:
        ValueError: The values are not colours; or any error of Pillow's if the file is corrupt.
    """
    image.load()
    if image.mode.startswith("I"):  # Pillow would clip values above 255
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() >= 1 << 16:
            raise ValueError("has numbers of 32 bits")
        return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("has floating-point numbers")
    return image if image.mode == "RGB" else image.convert("RGB")


class CuttableJpeg(NamedTuple):
    """A complete JPEG whose rows below a crop need not be decoded.

    It is of the usual kind: sequential, three colours of 8 bits in a single scan, with an end marker. Its rows are
    stored in order, so any decoder stops early if the header claims fewer rows.
    """

    encoded: bytes
    source: str
    size: tuple[int, int]
    height_at: int

    @classmethod
    def parse(cls, encoded: bytes, source: str) -> "CuttableJpeg | None":
        """Read the header; return ``None`` for images that Pillow must decode: other kinds and truncated files."""
        # Pillow refuses a file without its end, which a decoder that stops early cannot notice. A truncated file does
        # not end like this by chance: the marker cannot occur within the coded pixels.
        if not (encoded.startswith(b"\xff\xd8") and encoded.endswith(b"\xff\xd9")):
            return None
        jpeg, at = None, 2
        while at + 10 <= len(encoded) and encoded[at] == 0xFF:
            marker, length = struct.unpack_from(">BH", encoded, at + 1)
            if marker == 0xDA:  # start of scan: the coded pixels follow
                return jpeg if encoded[at + 4] == 3 else None
            if marker in (0xC0, 0xC1):  # frame header: Huffman-coded, sequential
                precision, height, width, colours = struct.unpack_from(">BHHB", encoded, at + 4)
                pixels = width * height
                is_too_large = Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS
                if jpeg or precision != 8 or colours != 3 or pixels == 0 or is_too_large:
                    return None
                jpeg = cls(encoded, source, (width, height), at + 5)
            elif marker != 0xC4 and not 0xDB <= marker <= 0xFE:  # not a table, a comment or an application's data
                return None
            at += 2 + length
        return None

    def crop(self, box: Box) -> np.ndarray:
        """Return the pixels in a box, (height, width, 3) uint8, equal to those of a crop of the whole image.

        Raises:
            UnreadableImageError: The image cannot be decoded.
        """
        encoded = self.encoded
        # A row's colours depend on at most the next two colour samples, each of two rows.
        rows = box.bottom + 4
        if rows < self.size[1]:
            encoded = bytearray(encoded)
            struct.pack_into(">H", encoded, self.height_at, rows)
        try:
            # Not strict: libjpeg warns of the bytes left over, and also of corrupt pixels, which Pillow ignores.
            pixels = simplejpeg.decode_jpeg(encoded, strict=False)
        except ValueError:
            return np.array(decode_rgb(self.encoded, self.source).crop(box))
        return pixels[box.top : box.bottom, box.left : box.right]


def resized(image: Image.Image, image_size: ImageSize, interpolation: str) -> Image.Image:
    """Resize the whole image, ignoring its aspect ratio, with Pillow's filter bicubic or bilinear."""
    height, width = height_and_width(image_size)
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling[interpolation.upper()])


def to_tensor(image: Image.Image | np.ndarray) -> Tensor:
    """Return the pixels as (3, height, width) uint8."""
    pixels = np.array(image) if isinstance(image, Image.Image) else image
    return torch.from_numpy(pixels).permute(2, 0, 1)
