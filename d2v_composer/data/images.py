"""Find image files, decode them to RGB, and augment them with random numbers that depend only on the sample."""

import errno
import io
import math
import os
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from d2v_composer.models.sizes import ImageSize, height_and_width
from d2v_composer.system.errors import InputError, UnreadableImageError

# Formats that Pillow decodes without other programs; for some it would run Ghostscript on an untrusted file.
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP")
# The suffixes that torchvision's ImageFolder reads.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
CROP_ATTEMPTS = 10
# Load Pillow's decoders now: without free file descriptors, Pillow takes a decoder that it cannot load for missing.
Image.init()


class ImageFile(NamedTuple):
    """An image in a folder."""

    path: str
    """Relative to the folder, with slashes."""
    num_bytes: int
    mtime_ns: int
    label: int | None


def list_images(root: Path) -> tuple[list[ImageFile], dict[str, int]]:
    """List the images in a folder and its subfolders, sorted by path, and count the other files by suffix.

    Hidden files and folders are skipped, links are followed, as torchvision's ImageFolder does.

    Raises:
        InputError: There are no images.
        OSError: A folder cannot be listed.
    """
    files: list[ImageFile] = []
    ignored: Counter[str] = Counter()

    def fail(error: OSError) -> NoReturn:  # os.walk would take a folder that cannot be listed for an empty one
        raise error

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=fail):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() not in SUFFIXES:
                ignored[path.suffix.lower() or "without suffix"] += 1
                continue
            # A dangling link counts as unreadable when it is read, as a corrupt image does.
            status = path.stat() if path.exists() else path.lstat()
            files.append(ImageFile(path.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns, label=None))
    if not files:
        raise InputError(f"{root}: no images; supported suffixes are {', '.join(SUFFIXES)}")
    return sorted(files), dict(sorted(ignored.items()))


def list_subfolders(folder: Path) -> list[str]:
    """Return the sorted names of the subfolders that are not hidden."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def read_image_file(path: Path) -> bytes:
    """Read an image file.

    Raises:
        UnreadableImageError: The file does not exist, or is a dangling link.
        OSError: The machine cannot read (no permission, too many open files, a failing disk, …).
    """
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            raise UnreadableImageError(f"{path}: cannot be read ({error.strerror})") from error
        raise


@contextmanager
def decoding(stored: bytes | Image.Image, source: str) -> Iterator[None]:
    """Convert any error raised in a ``with`` block that decodes an image to one line that names the image.

    Raises:
        UnreadableImageError: The image cannot be decoded. If memory or file descriptors run out, the error passes
            unchanged; Pillow's own OSErrors have no number.
    """
    try:
        yield
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{source}: {error}") from error
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        detail = f"{len(stored)} bytes" if isinstance(stored, bytes) else f"mode {stored.mode}"
        raise UnreadableImageError(f"{source}: not an image that can be read ({detail})") from error


def open_image(encoded: bytes) -> Image.Image:
    """Read the header of an image file.

    Raises:
        UnreadableImageError: The image has more than ``PIL.Image.MAX_IMAGE_PIXELS``. Pillow alone would warn, and
            decode twice as many.
    """
    limit = Image.MAX_IMAGE_PIXELS
    try:
        image = Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImageError(f"has more than {limit} pixels") from error
    if limit is not None and image.width * image.height > limit:
        raise UnreadableImageError(f"has {image.width} x {image.height} pixels, more than {limit}")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an image to RGB; 16-bit values become 8-bit.

    Raises:
        ValueError: The values are not colors. Pillow raises other errors if the file is corrupt.
    """
    image.load()
    if image.mode.startswith("I"):  # Pillow would clip values above 255
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() >= 1 << 16:
            raise ValueError("has 32-bit values")
        return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("has floating-point values")
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_rgb(stored: bytes | Image.Image, source: str) -> Image.Image:
    """Decode an image file, or the image of a ``pil`` column, to RGB; of an animation, use the first frame.

    Raises:
        UnreadableImageError: As :func:`decoding`.
    """
    with decoding(stored, source):
        return to_rgb(open_image(stored) if isinstance(stored, bytes) else stored)


def to_tensor(image: Image.Image | np.ndarray) -> Tensor:
    """Return the pixels as (3, height, width) uint8."""
    pixels = np.array(image) if isinstance(image, Image.Image) else image
    return torch.from_numpy(pixels).permute(2, 0, 1)


def to_pixels(stored: bytes | Image.Image, source: str, image_size: ImageSize, interpolation: str) -> Tensor:
    """Decode an image and resize all of it with Pillow's filter.

    Args:
        stored: An image file's bytes, or a decoded image.
        source: The image's name for errors.
        image_size: Pixels per side, or (height, width); the aspect ratio is not kept.
        interpolation: bicubic or bilinear.

    Returns:
        (3, height, width) uint8.

    Raises:
        UnreadableImageError: The image cannot be decoded.
    """
    image = decode_rgb(stored, source)
    height, width = height_and_width(image_size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling[interpolation.upper()])
    return to_tensor(image)


class Box(NamedTuple):
    """A rectangle of an image, in pixels: left ≤ x < right, top ≤ y < bottom."""

    left: int
    top: int
    right: int
    bottom: int


class CuttableJpeg(NamedTuple):
    """A complete JPEG, decoded no further than the last row of a crop.

    It is of the usual kind: sequential, three colors of 8 bits in a single scan, with an end marker. Its rows are
    stored in order, so any decoder stops early if the header claims fewer rows.
    """

    encoded: bytes
    source: str
    size: tuple[int, int]
    height_at: int

    @classmethod
    def parse(cls, encoded: bytes, source: str) -> "CuttableJpeg | None":
        """Read the header; return ``None`` for images that Pillow must decode: other formats and truncated files."""
        # Pillow rejects a file without its end, which a decoder that stops early cannot notice. A truncated file does
        # not end like this by chance: the marker cannot occur within the coded pixels.
        if not (encoded.startswith(b"\xff\xd8") and encoded.endswith(b"\xff\xd9")):
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
            elif marker != 0xC4 and not 0xDB <= marker <= 0xFE:  # not a table, a comment or an application's data
                return None
            at += 2 + length
        return None

    def crop(self, box: Box) -> np.ndarray:
        """Return the pixels in a box, (height, width, 3) uint8, exactly as a crop of the whole decoded image.

        Raises:
            UnreadableImageError: The image cannot be decoded.
        """
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
    """The training augmentation of one image."""

    image_size: ImageSize
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    interpolation: str = "bicubic"

    def __call__(self, image: bytes | Image.Image, rng: np.random.Generator, source: str = "image") -> Tensor:
        """Augment one image.

        Returns:
            (3, height, width) uint8.

        Raises:
            UnreadableImageError: The image cannot be decoded.
        """
        jpeg = CuttableJpeg.parse(image, source) if isinstance(image, bytes) else None
        whole = jpeg or decode_rgb(image, source)
        box = random_crop_box(*whole.size, rng, self.scale, self.ratio)
        # Torch's filter is Pillow's with weights of 16 instead of 22 bits: five times as fast, and few values differ,
        # by one. Cropping comes first, because the filter must not see pixels outside of the crop.
        crop, size = to_tensor(whole.crop(box))[None], height_and_width(self.image_size)
        pixels = functional.interpolate(crop, size, mode=self.interpolation, antialias=True)[0]
        return pixels.flip(-1) if rng.random() < self.flip else pixels
