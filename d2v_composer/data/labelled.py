"""Labelled images for retrieval, in memory as uint8: CIFAR-10 and CIFAR-100, folders, MDS."""

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from filelock import FileLock
from PIL import Image
from streaming.base.format.mds import MDSReader
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from d2v_composer.data.mds import read_index
from d2v_composer.data.transforms import decode_rgb, square, to_tensor
from d2v_composer.errors import InputError

__all__ = ["Format", "LabelledImages", "LabelledSet", "load_labelled_set"]

Format = Literal["cifar10", "cifar100", "folder", "mds"]
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class LabelledImages(NamedTuple):
    """Images with one label each."""

    images: Tensor
    """(N, 3, height, width) uint8."""
    labels: Tensor
    """(N,) int64."""


class LabelledSet(NamedTuple):
    """Two sets of images: either is the bank for the other's queries."""

    train: LabelledImages
    test: LabelledImages


def load_labelled_set(format: Format, root: str | Path, *, image_size: int, download: bool = False) -> LabelledSet:
    """Load a labelled set.

    Args:
        format: ``cifar10`` or ``cifar100``: torchvision's files below ``root``; ``folder``: root/train/CLASS/* and
            root/test/CLASS/*; ``mds``: root/train and root/test with the columns ``image`` and ``label``.
        root: Where it is.
        image_size: What the images of a folder or of MDS are resized to, in pixels a side (CIFAR stays as it is: it
            is resized in batches on the device).
        download: Whether CIFAR is fetched where it is missing.

    Raises:
        InputError: It is not there, is damaged, or has no images.
    """
    root = Path(root)
    if format == "cifar10":
        return LabelledSet(_cifar(CIFAR10, root, True, download), _cifar(CIFAR10, root, False, download))
    if format == "cifar100":
        return LabelledSet(_cifar(CIFAR100, root, True, download), _cifar(CIFAR100, root, False, download))
    if format == "folder":
        class_names = sorted(folder.name for folder in _subfolders(root / "train"))
        return LabelledSet(
            _folder(root / "train", class_names, image_size), _folder(root / "test", class_names, image_size)
        )
    if format == "mds":
        return LabelledSet(_mds(root / "train", image_size), _mds(root / "test", image_size))
    raise ValueError(f"format must be cifar10, cifar100, folder or mds, got {format!r}")


def _cifar(dataset_class: type[CIFAR10], root: Path, train: bool, download: bool) -> LabelledImages:
    try:
        if download:
            root.mkdir(parents=True, exist_ok=True)
        # Runs may share the folder, and machines.
        with FileLock(root / ".download.lock") if download else nullcontext():
            dataset = dataset_class(str(root), train=train, download=download)
    except Exception as error:
        hint = "" if download else "; set download: true to fetch it"
        raise InputError(
            f"{root}: no readable {dataset_class.__name__} ({str(error).splitlines()[0]}){hint}"
        ) from error
    return LabelledImages(torch.from_numpy(dataset.data).permute(0, 3, 1, 2), torch.tensor(dataset.targets))


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
    images = (decode_rgb(path.read_bytes(), str(path)) for path in files)
    return _stack(folder, images, [class_names.index(path.parent.name) for path in files], image_size)


def _mds(folder: Path, image_size: int) -> LabelledImages:
    shards = read_index(folder, columns=("image", "label"))
    samples = [sample for shard in shards for sample in MDSReader.from_json(str(folder), None, shard)]
    images = (decode_rgb(sample["image"], f"sample {i} of {folder}") for i, sample in enumerate(samples))
    return _stack(folder, images, [int(sample["label"]) for sample in samples], image_size)


def _stack(source: Path, images: Iterable[Image.Image], labels: list[int], image_size: int) -> LabelledImages:
    if not labels:
        raise InputError(f"{source}: no images; read are the suffixes {', '.join(sorted(IMAGE_SUFFIXES))}")
    pixels = torch.stack([to_tensor(square(image, image_size)) for image in images])
    return LabelledImages(pixels, torch.tensor(labels))
