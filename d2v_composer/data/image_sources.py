"""Which image files a folder holds, with which labels, and each as an RGB JPEG: ImageNet's layouts, any folder."""

import csv
import io
import os
import struct
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from d2v_composer.errors import InputError

__all__ = ["ImageFile", "ImageSource", "as_rgb_jpeg", "find_images"]

LAYOUTS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC", ".")
SPLITS = ("train", "val", "validation", "test")
NO_LABELS = "none"
JPEG_KINDS = {"RGB": None, "L": "greyscale"}


class ImageFile(NamedTuple):
    """One image of a source."""

    path: str
    """Below the source's root, with slashes."""
    num_bytes: int
    mtime_ns: int
    label: int | None


class ImageSource(NamedTuple):
    """The images of a folder."""

    root: Path
    files: list[ImageFile]
    """In the order of their paths; all have a label, or none has."""
    classes: list[str] | None
    """The classes' names by label, where they have names."""
    ignored: dict[str, int]
    """How many other files there are, by suffix."""


def find_images(source: str | Path, split: str = "train", labels: str | Path | None = None) -> ImageSource:
    """List the images of a data set.

    Looked for are SOURCE/ILSVRC/Data/CLS-LOC/SPLIT (Kaggle's archive), SOURCE/Data/CLS-LOC/SPLIT,
    SOURCE/CLS-LOC/SPLIT and SOURCE/SPLIT; where there are no splits at all, SOURCE itself is the folder of images.
    In it, a folder per class gives the labels: 0, 1, … in the order of the names (those of the train folder, for
    another split, so that both agree). A flat folder takes them from a labels file:

    - LOC_SPLIT_solution.csv of Kaggle (``ImageId,PredictionString``; the class is the string's first word), or any
      CSV file with the image in the first column and the class in the second;
    - a text file with a line ``filename label`` for each image.

    An image is named with or without its suffix; a label is a class's name or, all of them, a number from 0. The file
    is SPLIT.txt, SPLIT_labels.txt, labels.txt or Kaggle's, in SOURCE, beside the folder or in it, unless ``labels``
    names another. (The ground truth file of ILSVRC's devkit numbers the classes in an order of its own: no such file.)

    Args:
        source: The folder.
        split: The split's folder.
        labels: A labels file, or ``none`` for images without labels.

    Raises:
        InputError: There are no images, or their labels are not clear.
    """
    source = Path(source)
    if not source.is_dir():
        raise InputError(f"{source}: {'is not a folder' if source.exists() else 'no such folder'}")
    root = _split_folder(source, split)
    files, ignored = _walk(root)
    if not files:
        raise InputError(f"{root}: no images; read are the suffixes {', '.join(IMG_EXTENSIONS)}")
    labels_file = _labels_file(source, root, split, labels, flat=all("/" not in file.path for file in files))
    if labels_file is not None:
        names = _labels_of_file(labels_file, files)
    elif labels == NO_LABELS or all("/" not in file.path for file in files):
        return ImageSource(root, files, None, ignored)
    else:
        names = _labels_of_folders(root, files)
    if all(name.isdecimal() for name in names) and labels_file is not None:
        return ImageSource(root, _labelled(files, map(int, names)), None, ignored)
    classes = _class_names(source, root, names)
    number = {name: label for label, name in enumerate(classes)}
    return ImageSource(root, _labelled(files, (number[name] for name in names)), classes, ignored)


def _split_folder(source: Path, split: str) -> Path:
    for layout in LAYOUTS:
        if (source / layout / split).is_dir():
            return source / layout / split
    present = [name for name in SPLITS for layout in LAYOUTS if (source / layout / name).is_dir()]
    if split == "train" and not present:
        return source
    hint = f"there is: {', '.join(present)}" if present else "leave --split out where the folder itself is the split"
    raise InputError(f"{source}: no split {split!r}; {hint}")


def _walk(root: Path) -> tuple[list[ImageFile], dict[str, int]]:
    files: list[ImageFile] = []
    ignored: Counter[str] = Counter()
    # As torchvision's ImageFolder: links are followed. A folder that cannot be listed must not pass for an empty one.
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_cannot_list):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() in IMG_EXTENSIONS:
                # A dangling link is found unreadable when its turn comes, as a damaged image is.
                status = path.stat() if path.exists() else path.lstat()
                relative = path.relative_to(root).as_posix()
                files.append(ImageFile(relative, status.st_size, status.st_mtime_ns, label=None))
            else:
                ignored[path.suffix.lower() or "without suffix"] += 1
    return sorted(files), dict(sorted(ignored.items()))


def _cannot_list(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be listed ({error.strerror})") from error


def _labels_file(source: Path, root: Path, split: str, labels: str | Path | None, *, flat: bool) -> Path | None:
    if labels == NO_LABELS:
        return None
    if labels is not None:
        if not Path(labels).is_file():
            raise InputError(f"{labels}: no such labels file")
        return Path(labels)
    names = (f"LOC_{split}_solution.csv", f"{split}.txt", f"{split}_labels.txt", "labels.txt")
    candidates = [folder / name for folder in (source, root, root.parent) for name in names]
    return next((path for path in candidates if flat and path.is_file()), None)


def _labels_of_file(path: Path, files: list[ImageFile]) -> list[str]:
    try:
        labels = dict(_read_labels(path))
    except (ValueError, IndexError, csv.Error) as error:
        raise InputError(f"{path}: not a labels file: each line must be 'filename label'") from error
    if all("/" not in file.path for file in files):
        labels = {PurePosixPath(name).name: label for name, label in labels.items()}
    keys = [_without_suffix(file.path) for file in files]
    unlabelled = next((file.path for file, key in zip(files, keys, strict=True) if key not in labels), None)
    if unlabelled is not None:
        raise InputError(f"{path}: no label for {unlabelled}")
    absent = labels.keys() - set(keys)
    if absent:
        raise InputError(f"{path}: {len(absent)} of its images are not in the folder, the first is {min(absent)}")
    return [labels[key] for key in keys]


def _read_labels(path: Path) -> Iterable[tuple[str, str]]:
    with open(path, newline="", encoding="utf-8-sig") as lines:
        if path.suffix.lower() == ".csv":
            rows = ((row[0], row[1].split()[0]) for row in csv.reader(lines) if row and row[0] != "ImageId")
        else:
            fields = (line.rsplit(maxsplit=1) for line in lines if line.strip())
            rows = ((name, label) for name, label in fields)
        for name, label in rows:
            yield _without_suffix(name.strip()), label


def _without_suffix(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in IMG_EXTENSIONS else str(path)


def _labels_of_folders(root: Path, files: list[ImageFile]) -> list[str]:
    stray = next((file.path for file in files if "/" not in file.path), None)
    if stray is not None:
        raise InputError(
            f"{root / stray}: lies beside class folders and has no class; --labels {NO_LABELS} ignores them"
        )
    names = [file.path.split("/", 1)[0] for file in files]
    empty = sorted(set(_subfolders(root)) - set(names))
    if empty:
        raise InputError(f"{root / empty[0]}: a class folder without images; --labels {NO_LABELS} ignores the classes")
    return names


def _class_names(source: Path, root: Path, names: list[str]) -> list[str]:
    train = next((source / layout / "train" for layout in LAYOUTS if (source / layout / "train").is_dir()), root)
    classes = sorted(set(names))
    known = _subfolders(train) if train != root else []
    unknown = sorted(set(classes) - set(known))
    if known and unknown:
        raise InputError(f"{root}: the train folder has no class {unknown[0]!r}")
    return known or classes


def _subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _labelled(files: list[ImageFile], labels: Iterable[int]) -> list[ImageFile]:
    return [file._replace(label=label) for file, label in zip(files, labels, strict=True)]


def as_rgb_jpeg(encoded: bytes, source: str, resize: int | None, quality: int) -> tuple[bytes, str | None]:
    """An image file as an RGB JPEG that every reader decodes.

    An RGB JPEG with sound EXIF, or none, keeps its bytes. Anything else, and what is made smaller, is encoded anew,
    without metadata and with the pixels as stored: an EXIF orientation is not applied, as readers of the original
    bytes do not apply it.

    Args:
        encoded: The file's bytes.
        source: Named in the error.
        resize: What a longer short side becomes, in pixels.
        quality: Of the JPEG where it is encoded anew.

    Returns:
        The JPEG, and the kind of image where it was no plain RGB JPEG: ``PNG``, ``CMYK``, ``greyscale``,
        ``broken EXIF``, …

    Raises:
        InputError: The image cannot be read to its end.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(encoded))
            kind = _odd_kind(image)
            image.load()
            if kind is None and _exif_is_broken(image):
                kind = "broken EXIF"
            rgb = _shrink(_to_rgb(image), resize)
            if kind is None and rgb is image:
                return encoded, None
            buffer = io.BytesIO()
            # A fresh image: a JPEG's own would pass its comment and its profile on.
            Image.fromarray(np.asarray(rgb)).save(buffer, "JPEG", quality=quality)
    except Exception as error:
        reason = str(error).strip().splitlines()
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else reason[0] if reason else repr(error)
        raise InputError(f"{source}: cannot be read ({reason}; {len(encoded)} bytes)") from error
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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):  # Pillow would clip what is above 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _shrink(image: Image.Image, short_side: int | None) -> Image.Image:
    if short_side is None or min(image.size) <= short_side:
        return image
    width, height = (max(short_side, round(side * short_side / min(image.size))) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
