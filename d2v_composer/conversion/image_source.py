"""Which image files a folder holds, with which labels: ImageNet's layouts, and any folder."""

import csv
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from d2v_composer.data.image_folder import ImageFile, list_images
from d2v_composer.system.errors import InputError

__all__ = ["ImageSource", "find_images"]

LAYOUTS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC", ".")
SPLITS = ("train", "val", "validation", "test")
NO_LABELS = "none"


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
    names another. Refused is the ground truth file of ILSVRC's devkit: its numbers, 1 to 1000 and without file names,
    are in an order that is not that of the train folder's classes.

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
    files, ignored = list_images(root)
    labels_file = _labels_file(source, root, split, labels, flat=all("/" not in file.path for file in files))
    if labels_file is not None:
        names = _labels_of_file(labels_file, files)
    elif labels == NO_LABELS or all("/" not in file.path for file in files):
        return ImageSource(root, files, None, ignored)
    else:
        names = _labels_of_folders(root, files)
    known = _train_classes(source, root)
    if labels_file is not None and all(name.isdecimal() for name in names) and not known.issuperset(names):
        return ImageSource(root, _labelled(files, _numbers(labels_file, names, len(known))), None, ignored)
    classes = _class_names(root, set(names), known)
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
        raise InputError(
            f"{path}: not a labels file: each line must be 'filename label', or it is Kaggle's LOC_val_solution.csv "
            "(numbers alone, as in ILSVRC's devkit, are not in the order of the classes)"
        ) from error
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
    empty = sorted(_subfolders(root) - set(names))
    if empty:
        raise InputError(f"{root / empty[0]}: a class folder without images; --labels {NO_LABELS} ignores the classes")
    return names


def _train_classes(source: Path, root: Path) -> set[str]:
    """Empty where this is the train folder, or there is none."""
    train = next((source / layout / "train" for layout in LAYOUTS if (source / layout / "train").is_dir()), root)
    return set() if train == root else _subfolders(train)


def _class_names(root: Path, names: set[str], known: set[str]) -> list[str]:
    if known and not names <= known:
        raise InputError(f"{root}: the train folder has no class {min(names - known)!r}")
    return sorted(known or names)


def _numbers(path: Path, names: list[str], num_classes: int) -> list[int]:
    labels = [int(name) for name in names]
    if num_classes and max(labels) >= num_classes:
        raise InputError(f"{path}: has the label {max(labels)}; the train folder's classes are 0 to {num_classes - 1}")
    return labels


def _subfolders(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}


def _labelled(files: list[ImageFile], labels: Iterable[int]) -> list[ImageFile]:
    return [file._replace(label=label) for file, label in zip(files, labels, strict=True)]
