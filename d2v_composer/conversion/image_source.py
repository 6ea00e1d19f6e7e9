"""Find the images of a folder and their labels: ImageNet's layouts, or any folder."""

import csv
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from d2v_composer.data.image_folder import SUFFIXES, ImageFile, list_images, list_subfolders
from d2v_composer.system.errors import InputError

__all__ = ["ImageSource", "find_images"]

LAYOUTS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC", ".")
SPLITS = ("train", "val", "validation", "test")
NO_LABELS = "none"


class ImageSource(NamedTuple):
    """The images of a folder."""

    root: Path
    files: list[ImageFile]
    """The images by path; all have a label, or none has."""
    classes: list[str] | None
    """The name of each label; ``None`` if the labels have no names."""
    ignored: dict[str, int]
    """The number of other files by suffix."""


def find_images(source: str | Path, split: str = "train", labels: str | Path | None = None) -> ImageSource:
    """List the images of a data set.

    The images are in SOURCE/ILSVRC/Data/CLS-LOC/SPLIT (Kaggle's archive), SOURCE/Data/CLS-LOC/SPLIT,
    SOURCE/CLS-LOC/SPLIT or SOURCE/SPLIT; without any split, in SOURCE itself. There, a folder per class gives the
    labels: 0, 1, … in the order of the class names, which are those of the train folder for every split. A flat folder
    needs a labels file:

    - Kaggle's LOC_SPLIT_solution.csv (``ImageId,PredictionString``; the class is the string's first word), or any CSV
      file with the image in the first column and the class in the second;
    - a text file with a line ``filename label`` per image.

    An image is named with or without its suffix. A label is a class name or, in every line, a number from 0. The file
    is SPLIT.txt, SPLIT_labels.txt, labels.txt or Kaggle's; in SOURCE, next to the folder or in it, unless ``labels``
    names another. The ground truth file of ILSVRC's devkit is refused: it has no file names, and its numbers, 1 to
    1000, are not in the order of the train folder's classes.

    Args:
        source: The folder.
        split: The split's folder.
        labels: A labels file, or ``none`` for images without labels.

    Raises:
        InputError: There are no images, or their labels are ambiguous.
    """
    source = Path(source)
    if not source.is_dir():
        raise InputError(f"{source}: {'is not a folder' if source.exists() else 'no such folder'}")
    root = _split_folder(source, split)
    files, ignored = list_images(root)
    is_flat = all("/" not in file.path for file in files)
    labels_file = _labels_file(source, root, split, labels, is_flat)
    if labels_file is not None:
        names = _labels_of_file(labels_file, files, is_flat)
    elif labels == NO_LABELS or is_flat:
        return ImageSource(root, files, None, ignored)
    else:
        names = _labels_of_folders(root, files)
    known = _train_classes(source, root)
    if labels_file is not None and all(name.isdecimal() for name in names) and not known.issuperset(names):
        classes, numbers = None, [int(name) for name in names]
        if known and max(numbers) >= len(known):
            raise InputError(
                f"{labels_file}: has the label {max(numbers)}; the train folder's classes are 0 to {len(known) - 1}"
            )
    else:
        if known and not known.issuperset(names):
            raise InputError(f"{root}: the train folder has no class {min(set(names) - known)!r}")
        classes = sorted(known or set(names))
        number = {name: label for label, name in enumerate(classes)}
        numbers = [number[name] for name in names]
    labelled = [file._replace(label=label) for file, label in zip(files, numbers, strict=True)]
    return ImageSource(root, labelled, classes, ignored)


def _split_folder(source: Path, split: str) -> Path:
    for layout in LAYOUTS:
        if (source / layout / split).is_dir():
            return source / layout / split
    present = [name for name in SPLITS for layout in LAYOUTS if (source / layout / name).is_dir()]
    if split == "train" and not present:
        return source
    hint = f"there is: {', '.join(present)}" if present else "omit --split if the folder itself is the split"
    raise InputError(f"{source}: no split {split!r}; {hint}")


def _labels_file(source: Path, root: Path, split: str, labels: str | Path | None, is_flat: bool) -> Path | None:
    if labels == NO_LABELS:
        return None
    if labels is not None:
        if not Path(labels).is_file():
            raise InputError(f"{labels}: no such labels file")
        return Path(labels)
    names = (f"LOC_{split}_solution.csv", f"{split}.txt", f"{split}_labels.txt", "labels.txt")
    candidates = [folder / name for folder in (source, root, root.parent) for name in names]
    return next((path for path in candidates if is_flat and path.is_file()), None)


def _labels_of_file(path: Path, files: list[ImageFile], is_flat: bool) -> list[str]:
    try:
        labels = dict(_read_labels(path))
    except (ValueError, IndexError, csv.Error) as error:
        raise InputError(
            f"{path}: not a labels file: each line must be 'filename label', or it is Kaggle's LOC_val_solution.csv "
            "(the bare numbers of ILSVRC's devkit are not in the order of the classes)"
        ) from error
    if is_flat:
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
    return str(path.with_suffix("")) if path.suffix.lower() in SUFFIXES else str(path)


def _labels_of_folders(root: Path, files: list[ImageFile]) -> list[str]:
    stray = next((file.path for file in files if "/" not in file.path), None)
    if stray is not None:
        raise InputError(
            f"{root / stray}: lies next to class folders and has no class; --labels {NO_LABELS} ignores the classes"
        )
    names = [file.path.split("/", 1)[0] for file in files]
    empty = sorted(set(list_subfolders(root)) - set(names))
    if empty:
        raise InputError(f"{root / empty[0]}: a class folder without images; --labels {NO_LABELS} ignores the classes")
    return names


def _train_classes(source: Path, root: Path) -> set[str]:
    """Return the classes of the train folder; none if it is this folder or does not exist."""
    train = next((source / layout / "train" for layout in LAYOUTS if (source / layout / "train").is_dir()), root)
    return set() if train == root else set(list_subfolders(train))
