"""Convert any image file to an RGB JPEG."""

import io
import struct
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from d2v_composer.data.decode import is_of_machine, open_image, to_rgb
from d2v_composer.system.errors import UnreadableImageError

__all__ = ["as_rgb_jpeg"]

JPEG_KINDS = {"RGB": None, "L": "greyscale"}


def as_rgb_jpeg(encoded: bytes, source: str, resize: int | None, quality: int) -> tuple[bytes, str | None]:
    """Convert an image file to an RGB JPEG that every reader decodes.

    An RGB JPEG with valid EXIF, or none, keeps its bytes. Other files, and those resized, are encoded again without
    metadata. An EXIF orientation is not applied (except a TIFF's, by Pillow): torchvision's ImageFolder and readers of
    the original bytes ignore it too, so an image looks the same either way.

    Args:
        encoded: The file's bytes.
        source: The name of the image for the error.
        resize: Shrink a longer short side to this many pixels.
        quality: The quality of a JPEG that is encoded again.

    Returns:
        The JPEG, and the kind of the original if it was not a plain RGB JPEG: ``PNG``, ``CMYK``, ``greyscale``,
        ``broken EXIF``, …

    Raises:
        UnreadableImageError: The image is truncated, corrupt or not an image. A fault of the machine is raised as it
            is.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = open_image(encoded)
            kind = _odd_kind(image)
            image.load()
            if kind is None and _exif_is_broken(image):
                kind = "broken EXIF"
            rgb = _shrink(to_rgb(image), resize)
            if kind is None and rgb is image:
                return encoded, None
            buffer = io.BytesIO()
            # A new image: the original would pass on its comment and its profile.
            Image.fromarray(np.asarray(rgb)).save(buffer, "JPEG", quality=quality)
    except Exception as error:
        if is_of_machine(error):
            raise
        reason = str(error).strip().splitlines()
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else reason[0] if reason else repr(error)
        raise UnreadableImageError(f"{source}: cannot be read ({reason}; {len(encoded)} bytes)") from error
    return buffer.getvalue(), kind


def _odd_kind(image: Image.Image) -> str | None:
    if image.format not in ("JPEG", "MPO"):  # MPO: a camera's JPEG followed by more pictures
        return image.format
    return JPEG_KINDS.get(image.mode, image.mode)


def _exif_is_broken(image: Image.Image) -> bool:
    # Parse it again: opening the image has parsed it, and ignored the errors.
    exif = Image.Exif()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            exif.load(image.info.get("exif", b""))
            list(exif.items())
        except (SyntaxError, ValueError, TypeError, LookupError, OSError, EOFError, ArithmeticError, struct.error):
            return True
    return bool(caught)


def _shrink(image: Image.Image, short_side: int | None) -> Image.Image:
    if short_side is None or min(image.size) <= short_side:
        return image
    width, height = (max(short_side, round(side * short_side / min(image.size))) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
