"""Any image file as an RGB JPEG."""

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
    """An image file as an RGB JPEG that every reader decodes.

    An RGB JPEG with sound EXIF, or none, keeps its bytes. Anything else, and what is made smaller, is encoded anew,
    without metadata. An EXIF orientation is not applied (save a TIFF's, by Pillow): torchvision's ImageFolder and the
    readers of kept bytes ignore it too, so a picture looks the same kept or encoded anew.

    Args:
        encoded: The file's bytes.
        source: Named in the error.
        resize: What a longer short side becomes, in pixels.
        quality: Of the JPEG where it is encoded anew.

    Returns:
        The JPEG, and the kind of image where it was no plain RGB JPEG: ``PNG``, ``CMYK``, ``greyscale``,
        ``broken EXIF``, …

    Raises:
        UnreadableImageError: The image cannot be read to its end. A fault of the machine is raised as it is.
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
            # A fresh image: a JPEG's own would pass its comment and its profile on.
            Image.fromarray(np.asarray(rgb)).save(buffer, "JPEG", quality=quality)
    except Exception as error:
        if is_of_machine(error):
            raise
        reason = str(error).strip().splitlines()
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else reason[0] if reason else repr(error)
        raise UnreadableImageError(f"{source}: cannot be read ({reason}; {len(encoded)} bytes)") from error
    return buffer.getvalue(), kind


def _odd_kind(image: Image.Image) -> str | None:
    if image.format not in ("JPEG", "MPO"):  # MPO: a camera's JPEG with more pictures behind it
        return image.format
    return JPEG_KINDS.get(image.mode, image.mode)


def _exif_is_broken(image: Image.Image) -> bool:
    # Parsed afresh: opening the image has parsed it before, and swallowed what was wrong.
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
