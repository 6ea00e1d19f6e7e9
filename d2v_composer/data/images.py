"""Decode images to RGB, resize or augment them, and encode them as JPEGs."""

import io
import math
import struct
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from d2v_composer.data.modality import Modality, decoding
from d2v_composer.models.configs import ImageSize, height_and_width
from d2v_composer.models.provenance import Json
from d2v_composer.system.errors import InputError, UnreadableSampleError

CROP_ATTEMPTS = 10
ORIENTATION = 0x0112  # tag in an EXIF record
# EXIF orientation → the transposition that turns the image upright; an image of orientation 1 is upright.
TURNS = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), 2))
JPEG_START = b"\xff\xd8"
with suppress(ImportError):
    import_module("pillow_heif").register_heif_opener()
# Load Pillow's decoders now: without free file descriptors, Pillow takes a decoder that it cannot load for missing.
Image.init()
# Suffixes that Pillow knows if it can decode such files, and the package that it needs for that.
NEEDS = {".avif": "pillow>=11.3", **dict.fromkeys((".heic", ".heif", ".hif"), "pillow-heif")}
KNOWN = {suffix: Image.EXTENSION[suffix] for suffix in NEEDS if suffix in Image.EXTENSION}
# Formats that Pillow decodes without other programs; for some it would run Ghostscript on an untrusted file.
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP", *sorted({*KNOWN.values()}))


def open_image(encoded: bytes) -> Image.Image:
    """Read the header of an image file."""
    limit = Image.MAX_IMAGE_PIXELS
    try:
        image = Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableSampleError(f"it has more than {limit} pixels") from error
    if limit is not None and image.width * image.height > limit:
        raise UnreadableSampleError(f"it has {image.width} x {image.height} pixels; the limit is {limit}")
    return image


def turn_of(exif: bytes) -> Image.Transpose | None:
    """Return the transposition that turns an image upright, given its EXIF record; ``None`` if no turn is needed."""
    with suppress(Exception):  # without a record, or with a corrupt one
        record = Image.Exif()
        record.load(exif)
        return TURNS.get(record[ORIENTATION])
    return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an image to upright RGB; 16-bit values become 8-bit."""
    image.load()  # Pillow turns a TIFF
    if (turn := turn_of(image.info.get("exif", b""))) is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I"):  # Pillow would clip values above 255
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() >= 1 << 16:
            raise ValueError("it has pixel values below 0 or above 65,535")
        return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("it has floating-point pixels; only integer pixels are supported")
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_rgb(stored: bytes | Image.Image, source: str) -> Image.Image:
    """Decode an image file, or a PIL image, to upright RGB; of an animation, decode the first frame."""
    with decoding(stored, source, "an image"):
        return to_rgb(open_image(stored) if isinstance(stored, bytes) else stored)


class Box(NamedTuple):
    """A rectangle of an image, in pixels: left ≤ x < right, top ≤ y < bottom."""

    left: int
    top: int
    right: int
    bottom: int


class CuttableJpeg(NamedTuple):
    """A JPEG file that :meth:`crop` need not decode completely."""

    # Accepted are sequential files with three colors of 8 bits in a single scan. Their rows are stored in order, so a
    # decoder stops early if the header claims fewer rows.

    encoded: bytes
    source: str
    size: tuple[int, int]
    height_at: int
    format = "JPEG"

    @classmethod
    def parse(cls, encoded: bytes, source: str) -> "CuttableJpeg | None":
        """Read the header of a JPEG file; return ``None`` if Pillow must decode the file."""
        # Pillow rejects a file without its end, which a decoder that stops early cannot notice. A truncated file does
        # not end like this by chance: the marker cannot occur within the coded pixels.
        if not (encoded.startswith(JPEG_START) and encoded.endswith(b"\xff\xd9")):
            return None
        jpeg, at = None, 2
        while at + 10 <= len(encoded) and encoded[at] == 0xFF:
            marker, length = struct.unpack_from(">BH", encoded, at + 1)
            if marker == 0xDA:  # start of scan: the coded pixels follow
                return jpeg if encoded[at + 4] == 3 else None
            if marker in (0xC0, 0xC1):  # frame header: Huffman-coded, sequential
                precision, height, width, colors = struct.unpack_from(">BHHB", encoded, at + 4)
                pixels = width * height
                is_too_large = Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS
                if jpeg or precision != 8 or colors != 3 or pixels == 0 or is_too_large:
                    return None
                jpeg = cls(encoded, source, (width, height), at + 5)
            elif marker == 0xE1:
                if turn_of(encoded[at + 4 : at + 2 + length]) is not None:
                    return None
            elif marker != 0xC4 and not 0xDB <= marker <= 0xFE:  # not a table, a comment or an application's data
                return None
            at += 2 + length
        return None

    def crop(self, box: Box) -> np.ndarray:
        """Return the decoded pixels in a box, (height, width, 3) uint8."""
        encoded = self.encoded
        # A row's colors depend on at most the next two color samples, each of two rows.
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


def read_image(stored: bytes | Image.Image, source: str) -> CuttableJpeg | Image.Image:
    """Return an image whose crops are RGB and upright."""
    jpeg = CuttableJpeg.parse(stored, source) if isinstance(stored, bytes) else None
    return jpeg or decode_rgb(stored, source)


def resized_crop(
    image: CuttableJpeg | Image.Image, size: tuple[int, int], interpolation: str, box: Box | None = None
) -> Tensor:
    """Resize a box of an image, by default the whole image, to (3, height, width) uint8."""
    # torch's filter is Pillow's with weights of 16, not 22, bits: five times as fast, and few values differ, by 1.
    pixels = np.require(image.crop(box or Box(0, 0, *image.size)), requirements="W")
    channels_first = torch.from_numpy(pixels).permute(2, 0, 1)
    if pixels.shape[:2] == size:
        return channels_first
    return functional.interpolate(channels_first[None], size, mode=interpolation, antialias=True)[0]


def random_crop_box(
    width: int, height: int, rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Draw a box of random area and aspect ratio (Szegedy et al. 2015, arXiv:1409.4842, section 6).

    Args:
        scale: The smallest and largest share of the image's area.
        ratio: The smallest and largest ratio of width to height. The logarithm of the ratio is drawn uniformly.

    Returns:
        The first of ten draws that fits into the image, or the largest box in the center whose ratio is allowed.
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
    """An augmentation of an image: a random crop, resized to ``image_size``, and a random horizontal flip."""

    image_size: ImageSize
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    interpolation: str = "bicubic"
    longest = None

    @property
    def sample_bytes(self) -> int:
        return 3 * math.prod(height_and_width(self.image_size))

    def __call__(self, sample: bytes | Image.Image | Tensor, rng: np.random.Generator, source: str = "image") -> Tensor:
        """Augment an image, given as a file's bytes, a PIL image or a (3, height, width) uint8 tensor.

        Returns:
            The augmented image, (3, height, width) uint8, of the size ``image_size``.

        Raises:
            UnreadableSampleError: The image cannot be decoded.
        """
        stored = Image.fromarray(sample.permute(1, 2, 0).numpy()) if isinstance(sample, Tensor) else sample
        image = read_image(stored, source)
        box = random_crop_box(*image.size, rng, self.scale, self.ratio)
        pixels = resized_crop(image, height_and_width(self.image_size), self.interpolation, box)
        return pixels.flip(-1) if rng.random() < self.flip else pixels


@dataclass(frozen=True)
class Images(Modality):
    """Images, resized to one size without keeping the aspect ratio.

    Attributes:
        image_size: Pixels per side, or (height, width).
        interpolation: Filter of the resizing: ``bicubic`` or ``bilinear``.
    """

    image_size: ImageSize = 224
    interpolation: str = "bicubic"
    name = "image"
    unit = "images"
    cost_unit = "image"
    # What torchvision's ImageFolder reads, and more.
    suffixes = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", *KNOWN)
    needs = NEEDS
    encodings = ("bytes", "jpeg", "png", "pil")
    options = frozenset({"crop_scale", "crop_ratio", "flip"})
    batch_size = 256

    @classmethod
    def of(cls, config: Any) -> "Images":
        if config.in_chans != 3:
            raise InputError(
                f"the model must have 3 input channels, because images are read as RGB; got {config.in_chans}"
            )
        return cls(config.image_size, config.interpolation)

    def decode(self, stored: bytes | Image.Image, source: str) -> Tensor:
        """Decode and resize an image to (3, height, width) uint8."""
        height, width = height_and_width(self.image_size)
        if isinstance(stored, bytes) and stored.startswith(JPEG_START):
            image = read_image(stored, source)
        else:
            image = decode_rgb(stored, source).resize((width, height), Image.Resampling[self.interpolation.upper()])
        return resized_crop(image, (height, width), self.interpolation)

    @classmethod
    def encode(  # pyright: ignore[reportIncompatibleMethodOverride]: each modality has options of its own
        cls, stored: bytes | Image.Image, source: str, resize: int | None = None, quality: int = 90
    ) -> tuple[bytes, None]:
        """Keep an upright RGB JPEG file unless the image must be resized; otherwise, write a JPEG without metadata.

        An image whose shorter side has more than ``resize`` pixels is resized, so that this side has ``resize`` pixels.

        Raises:
            UnreadableSampleError: The image cannot be decoded.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = read_image(stored, source)
            height, width = size = image.size[::-1]
            if resize is not None and min(size) > resize:
                height, width = (max(resize, round(side * resize / min(size))) for side in size)
            pixels = resized_crop(image, (height, width), "bicubic").permute(1, 2, 0).numpy()
            # MPO: a camera's JPEG followed by more pictures. What Pillow turned or converted has no format.
            if (height, width) == size and image.format in ("JPEG", "MPO") and isinstance(stored, bytes):
                return stored, None
        with decoding(stored, source, "an image"):
            buffer = io.BytesIO()
            # A new image: the original would pass on its comment and its profile.
            Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
            return buffer.getvalue(), None

    @classmethod
    def of_side(cls, side: int) -> "Images":
        return cls(side)

    def augmentation(self, for_views: bool, **options: Json) -> RandomResizedCropFlip:
        scale, ratio, flip = (options[name] for name in ("crop_scale", "crop_ratio", "flip"))
        return RandomResizedCropFlip(self.image_size, scale, ratio, flip, self.interpolation)

    def stack(self, samples: Iterator[Tensor], count: int) -> Tensor:
        """Stack images, (``count``, 3, height, width), as they are decoded."""
        stacked = torch.empty(0)
        for i, image in enumerate(samples):
            stacked = stacked if i else image.new_empty(count, *image.shape)
            stacked[i] = image
        return stacked
