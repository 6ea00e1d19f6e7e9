"""List the images of a folder, and read their bytes."""

import errno
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple, NoReturn

from torchvision.datasets.folder import IMG_EXTENSIONS

from d2v_composer.system.errors import InputError, UnreadableImageError

__all__ = ["ImageFile", "list_images", "read_image_file"]

# A dangling link, or a file removed since it was listed: that image is not there.
ABSENT = (errno.ENOENT, errno.ELOOP)
FORBIDDEN = (errno.EACCES, errno.EPERM)


class ImageFile(NamedTuple):
    """One image of a source."""

    path: str
    """Below the source's root, with slashes."""
    num_bytes: int
    mtime_ns: int
    label: int | None


def list_images(root: Path) -> tuple[list[ImageFile], dict[str, int]]:
    """The images in a folder and its subfolders, in the order of their paths, and the other files by suffix.

    Raises:
        InputError: There are no images, or a folder cannot be listed.
    """
    files: list[ImageFile] = []
    ignored: Counter[str] = Counter()
    # As torchvision's ImageFolder: links are followed. A folder that cannot be listed must not pass for an empty one.
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_cannot_list):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() in IMG_EXTENSIONS:
                status = _status(path)
                relative = path.relative_to(root).as_posix()
                files.append(ImageFile(relative, status.st_size, status.st_mtime_ns, label=None))
            else:
                ignored[path.suffix.lower() or "without suffix"] += 1
    if not files:
        raise InputError(f"{root}: no images; read are the suffixes {', '.join(IMG_EXTENSIONS)}")
    return sorted(files), dict(sorted(ignored.items()))


def read_image_file(path: Path) -> bytes:
    """Read an image file.

    Raises:
        UnreadableImageError: It is not there.
        InputError: Reading it is not permitted, which is a fault of the folder's settings and not of the image.
        OSError: The machine cannot read (too many open files, a disk that fails, …).
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


def _cannot_list(error: OSError) -> NoReturn:
    raise InputError(f"{error.filename}: cannot be listed ({error.strerror})") from error


def _status(path: Path) -> os.stat_result:
    try:
        # A dangling link is found unreadable when its turn comes, as a damaged image is.
        return path.stat() if path.exists() else path.lstat()
    except OSError as error:
        _cannot_list(error)
