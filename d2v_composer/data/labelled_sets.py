"""Labelled images for retrieval, in memory as uint8: CIFAR-10 and CIFAR-100, folders, MDS."""

import json
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from filelock import FileLock
from PIL import Image
from streaming.base.format.mds import MDSReader
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from d2v_composer.data.decode import decode_rgb, rgb_of, square, to_tensor
from d2v_composer.data.image_folder import read_image_file
from d2v_composer.data.mds_index import SUMMARY, check_image_column, keep_encoded, read_index
from d2v_composer.system.errors import InputError
from d2v_composer.system.retry import reason

__all__ = ["Format", "LabelledImages", "LabelledSet", "load_labelled_set"]

Format = Literal["cifar10", "cifar100", "folder", "mds"]
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class LabelledImages(NamedTuple):
    """Images with one label each."""

    images: Tensor
    """(N, 3, height, width) uint8."""
    labels: Tensor
    """(N,) int64."""

    def at_most(self, num_images: int) -> "LabelledImages":
        """So many of them, evenly spaced, since a folder has them class by class; all where there are no more."""
        total = len(self.labels)
        if num_images >= total:
            return self
        chosen = torch.arange(num_images) * total // num_images
        return LabelledImages(self.images[chosen], self.labels[chosen])


class LabelledSet(NamedTuple):
    """Two sets of images: either is the bank for the other's queries."""

    train: LabelledImages
    test: LabelledImages
    class_names: tuple[str, ...] = ()
    """By label; none where the labels are bare numbers."""

    def at_most(self, num_images: int) -> "LabelledSet":
        """The same classes with so many images in each split, see :meth:`LabelledImages.at_most`."""
        return self._replace(train=self.train.at_most(num_images), test=self.test.at_most(num_images))

    @property
    def num_images(self) -> tuple[int, int]:
        """Of train and test."""
        return len(self.train.labels), len(self.test.labels)


def load_labelled_set(
    format: Format,
    root: str | Path,
    *,
    image_size: int,
    download: bool = False,
    column: str = "image",
    label_column: str = "label",
) -> LabelledSet:
    """Load a labelled set.

    Args:
        format: ``cifar10`` or ``cifar100``: torchvision's files below ``root``; ``folder``: root/train/CLASS/* and
            root/test/CLASS/*; ``mds``: root/train and root/test.
        root: Where it is.
        image_size: What the images of a folder or of MDS are resized to, in pixels a side (CIFAR stays as it is: it
            is resized in batches on the device).
        download: Whether CIFAR is fetched where it is missing.
        column: Of an MDS data set, the one with the images.
        label_column: Of an MDS data set, the one with the labels.

    Raises:
        InputError: It is not there, is damaged, or has no images.
    """
    root = Path(root)
    if format == "cifar10":
        return _cifar(CIFAR10, root, download)
    if format == "cifar100":
        return _cifar(CIFAR100, root, download)
    if format == "folder":
        class_names = sorted(folder.name for folder in _subfolders(root / "train"))
        train, test = (_folder(root / split, class_names, image_size) for split in ("train", "test"))
        return LabelledSet(train, test, tuple(class_names))
    if format == "mds":
        train, test = (_mds(root / split, image_size, column, label_column) for split in ("train", "test"))
        return LabelledSet(train, test, _mds_class_names(root / "train"))
    raise ValueError(f"format must be cifar10, cifar100, folder or mds, got {format!r}")


def _cifar(dataset_class: type[CIFAR10], root: Path, download: bool) -> LabelledSet:
    try:
        if download:
            root.mkdir(parents=True, exist_ok=True)
        # Runs may share the folder, and machines.
        with FileLock(root / ".download.lock") if download else nullcontext():
            splits = [dataset_class(str(root), train=train, download=download) for train in (True, False)]
    except Exception as error:
        hint = "" if download else "; set download: true to fetch it"
        raise InputError(
            f"{root}: no readable {dataset_class.__name__} ({str(error).splitlines()[0]}){hint}"
        ) from error
    train, test = (
        LabelledImages(torch.from_numpy(split.data).permute(0, 3, 1, 2), torch.tensor(split.targets))
        for split in splits
    )
    return LabelledSet(train, test, tuple(splits[0].classes))


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one with a subfolder per class")
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _folder(folder: Path, class_names: list[str], image_size: int) -> LabelledImages:
    files = [path for subfolder in _subfolders(folder) for path in sorted(subfolder.iterdir())]
    files = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    unknown = sorted({path.parent.name for path in files} - set(class_names))
    if unknown:
        raise InputError(f"{folder / unknown[0]}: a class that the train folder lacks")
    images = (decode_rgb(read_image_file(path), str(path)) for path in files)
    return _stack(folder, images, [class_names.index(path.parent.name) for path in files], image_size)


def _mds(folder: Path, image_size: int, column: str, label_column: str) -> LabelledImages:
    shards = read_index(folder, columns=(column, label_column), option="column and label_column")
    check_image_column(shards, column, str(folder))
    samples = [sample for shard in shards for sample in _samples(folder, shard, column)]
    images = (rgb_of(sample[column], f"sample {i} of {folder}") for i, sample in enumerate(samples))
    return _stack(folder, images, _labels(folder, [sample[label_column] for sample in samples]), image_size)


def _labels(folder: Path, stored: list[Any]) -> list[int]:
    try:
        return [int(label) for label in stored]
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder}: its labels must be whole numbers ({reason(error)})") from error


def _samples(folder: Path, shard: dict[str, Any], column: str) -> list[dict[str, Any]]:
    reader = MDSReader.from_json(str(folder), None, shard)
    keep_encoded([reader], column)
    path = folder / shard["raw_data"]["basename"]
    try:
        return list(reader)
    except OSError as error:
        raise InputError(f"{path}: the shard cannot be read ({reason(error)})") from error
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{path}: the shard is damaged ({reason(error)})") from error


def _mds_class_names(folder: Path) -> tuple[str, ...]:
    """What recipes/convert_imagenet.py wrote beside the index, where it did."""
    try:
        return tuple(json.loads((folder / SUMMARY).read_bytes())["classes"] or ())
    except FileNotFoundError:
        return ()
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / SUMMARY}: damaged ({type(error).__name__})") from error


def _stack(source: Path, images: Iterable[Image.Image], labels: list[int], image_size: int) -> LabelledImages:
    if not labels:
        raise InputError(f"{source}: no images; read are the suffixes {', '.join(sorted(IMAGE_SUFFIXES))}")
    pixels = torch.stack([to_tensor(square(image, image_size)) for image in images])
    return LabelledImages(pixels, torch.tensor(labels))
