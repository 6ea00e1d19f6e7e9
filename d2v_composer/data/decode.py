"""From an encoded image to the pixels that a model sees, as a function of an explicit random generator.

The training recipe of data2vec 2.0: random resized crop with scale (0.08, 1), ratio 3/4 to 4/3, bicubic, and a
horizontal flip with probability 0.5. Pixels stay uint8: normalising is the model's business, on its device.
"""

import io
import struct
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from d2v_composer.system.errors import UnreadableImageError

__all__ = [
    "Box",
    "CuttableJpeg",
    "decode_rgb",
    "is_of_machine",
    "open_image",
    "rgb_of",
    "square",
    "to_rgb",
    "to_tensor",
]

# What Pillow decodes by itself; for others it calls programs, such as Ghostscript, with a stranger's file.
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP")
# Load Pillow's decoders now: where descriptors are short, it takes one that it cannot load for one that it lacks.
Image.init()


class Box(NamedTuple):
    """A rectangle of an image, in pixels: left ≤ x < right, top ≤ y < bottom."""

    left: int
    top: int
    right: int
    bottom: int


def decode_rgb(encoded: bytes, source: str) -> Image.Image:
    """Decode an image of any kind to RGB; of an animation, the first frame.

    Args:
        encoded: The file's bytes.
        source: Named in the error.

    Raises:
        UnreadableImageError: The bytes are no image, a damaged one, or one of more than
            ``PIL.Image.MAX_IMAGE_PIXELS``. A fault of the machine is raised as it is.
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
    """Whether decoding failed for want of memory or descriptors: Pillow's own errors have no number."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)


def rgb_of(stored: bytes | Image.Image, source: str) -> Image.Image:
    """An image column's value in RGB: a file's bytes, or pixels (of an encoding ``pil``).

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
        ImageSizeError: It has too many pixels. Pillow alone would warn of it, and decode twice as many.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageSizeError(f"has more than {Image.MAX_IMAGE_PIXELS} pixels") from error
    check_size(image)
    return image


def check_size(image: Image.Image) -> None:
    """Refuse an image by what its header says.

    Raises:
        ImageSizeError: It has too many pixels.
    """
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ImageSizeError(f"has {image.width} x {image.height} pixels, more than {Image.MAX_IMAGE_PIXELS}")


def to_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB; its colours of 16 bits in 8.

    Raises:
        ValueError: Its numbers are no colours; and whatever Pillow raises where its file is damaged.
    """
    image.load()
    if image.mode.startswith("I"):  # Pillow would clip what is above 255
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() >= 1 << 16:
            raise ValueError("has numbers of 32 bits")
        return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("has floating-point numbers")
    return image if image.mode == "RGB" else image.convert("RGB")


class CuttableJpeg(NamedTuple):
    """A JPEG of which the rows below a crop need not be decoded.

    It is one of the common kind, and whole: sequential, three colours of 8 bits in a single scan, with its end marker.
    Its rows lie in order, so a header that tells of fewer rows makes any decoder stop after those.
    """

    encoded: bytes
    source: str
    size: tuple[int, int]
    height_at: int

    @classmethod
    def parse(cls, encoded: bytes, source: str) -> "CuttableJpeg | None":
        """Read the header; ``None`` is whatever should be left to Pillow: other images, and those cut short."""
        # Pillow refuses a file without its end, which a decoder that stops early cannot notice. A cut file does not
        # end like this by chance: the marker cannot occur within the coded pixels.
        if not (encoded.startswith(b"\xff\xd8") and encoded.endswith(b"\xff\xd9")):
            return None
        jpeg, at = None, 2
        while at + 10 <= len(encoded) and encoded[at] == 0xFF:
            marker, length = struct.unpack_from(">BH", encoded, at + 1)
            if marker == 0xDA:  # start of scan: the coded pixels follow
                return jpeg if encoded[at + 4] == 3 else None
            if marker in (0xC0, 0xC1):  # frame header: Huffman-coded, sequential
                precision, height, width, colours = struct.unpack_from(">BHHB", encoded, at + 4)
                # Pillow says what is to say about pictures that take all the memory.
                pixels = width * height
                too_large = Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS
                if jpeg or precision != 8 or colours != 3 or pixels == 0 or too_large:
                    return None
                jpeg = cls(encoded, source, (width, height), at + 5)
            elif marker != 0xC4 and not 0xDB <= marker <= 0xFE:  # not a table, a comment or an application's own
                return None
            at += 2 + length
        return None

    def crop(self, box: Box) -> np.ndarray:
        """(height, width, 3) uint8: the very pixels that a crop of the whole image has.

        Raises:
            UnreadableImageError: It cannot be decoded.
        """
        encoded = self.encoded
        # A row's colours depend on at most the next two colour samples, each of two rows.
        rows = box.bottom + 4
        if rows < self.size[1]:
            encoded = bytearray(encoded)
            struct.pack_into(">H", encoded, self.height_at, rows)
        try:
            # Not strict: libjpeg warns of the bytes left over; and of damaged pixels, which Pillow lets pass, too.
            pixels = simplejpeg.decode_jpeg(encoded, strict=False)
        except ValueError:
            return np.array(decode_rgb(self.encoded, self.source).crop(box))
        return pixels[box.top : box.bottom, box.left : box.right]


def square(image: Image.Image, size: int) -> Image.Image:
    """The whole image in ``size`` by ``size`` pixels (Pillow's bicubic filter), whatever its aspect ratio was."""
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> Tensor:
    """(3, height, width) uint8."""
    return _to_tensor(np.array(image))


def _to_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)
