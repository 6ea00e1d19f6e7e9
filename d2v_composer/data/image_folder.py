"""List the images of a folder, and read them."""

import errno
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple, NoReturn

from PIL import Image
from torch import Tensor

from d2v_composer.data.decode import resized, rgb_of, to_tensor
from d2v_composer.models.sizes import ImageSize
from d2v_composer.system.errors import InputError, UnreadableImageError

__all__ = ["SUFFIXES", "ImageFile", "list_images", "list_subfolders", "read_image_file", "to_pixels"]

# Those of torchvision's ImageFolder.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# A dangling link, or a file deleted since it was listed: this image is missing.
ABSENT = (errno.ENOENT, errno.ELOOP)
FORBIDDEN = (errno.EACCES, errno.EPERM)


class ImageFile(NamedTuple):
    """One image of a folder."""

    path: str
    """Relative to the folder, with slashes."""
    num_bytes: int
    mtime_ns: int
    label: int | None


def list_images(root: Path) -> tuple[list[ImageFile], dict[str, int]]:
    """List the images of a folder and its subfolders by path, and count the other files by suffix.

    Hidden files and folders are skipped, links are followed, as torchvision's ImageFolder does.

    Raises:
        InputError: There are no images, or a folder cannot be listed.
    """
    files: list[ImageFile] = []
    ignored: Counter[str] = Counter()
    # A folder that cannot be listed must not count as an empty one.
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_cannot_list):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() in SUFFIXES:
                status = _status(path)
                relative = path.relative_to(root).as_posix()
                files.append(ImageFile(relative, status.st_size, status.st_mtime_ns, label=None))
            else:
                ignored[path.suffix.lower() or "without suffix"] += 1
    if not files:
        raise InputError(f"{root}: no images; the suffixes read are {', '.join(SUFFIXES)}")
    return sorted(files), dict(sorted(ignored.items()))


def list_subfolders(folder: Path) -> list[str]:
    """Return the sorted names of the subfolders that are not hidden.

    Raises:
        InputError: There is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one with a subfolder per class")
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def read_image_file(path: Path) -> bytes:
    """Read an image file.

    Raises:
        UnreadableImageError: The file does not exist.
        InputError: Access is denied: the folder's permissions are at fault, not the image.
        OSError: The machine cannot read (too many open files, a failing disk, …).
    """
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno in ABSENT:
            raise UnreadableImageError(f"{path}: cannot be read ({error.strerror})") from error
        if error.errno in FORBIDDEN:
            raise InputError(
                f"{path}: cannot be read ({error.strerror}): grant the permission, or remove it"
            ) from error
        raise


def to_pixels(stored: bytes | Image.Image, source: str, image_size: ImageSize, interpolation: str) -> Tensor:
    """Decode a file's bytes, or the value of an image column, to (3, height, width) uint8.

    Args:
        stored: The encoded or decoded image.
        source: The name of the image for the error.
        image_size: Pixels a side, or (height, width); the aspect ratio is not kept.
        interpolation: bicubic or bilinear.

    Raises:
        UnreadableImageError: It is truncated, corrupt or not an image.
    """
    return to_tensor(resized(rgb_of(stored, source), image_size, interpolation))


def _cannot_list(error: OSError) -> NoReturn:
    raise InputError(f"{error.filename}: cannot be listed ({error.strerror})") from error


def _status(path: Path) -> os.stat_result:
    try:
        # A dangling link counts as unreadable when it is read, as a corrupt image does.
        return path.stat() if path.exists() else path.lstat()
    except OSError as error:
        _cannot_list(error)
