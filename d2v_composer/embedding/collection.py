"""Read images in a fixed order, each with an id: those of a folder, of an MDS data set, or of CIFAR."""

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from typing_extensions import override

from d2v_composer.data.image_folder import list_images, read_image_file, to_pixels
from d2v_composer.data.labelled_sets import CIFAR_FOLDERS, Format, load_labelled_set
from d2v_composer.data.mds_index import (
    INDEX,
    check_room,
    fetch_index,
    keep_encoded,
    read_image_index,
    room_needed,
)
from d2v_composer.models.sizes import ImageSize
from d2v_composer.system.errors import InputError, ShardError
from d2v_composer.system.fetch import is_remote

__all__ = ["ImageCollection", "open_collection"]

CIFAR_FORMATS: dict[str, Format] = {folder: format for format, folder in CIFAR_FOLDERS.items()}


class ImageCollection(ABC):
    """Images in a fixed order.

    Attributes:
        fingerprint: A hash of everything that may change the images.
    """

    fingerprint: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def ids(self, indices: ArrayLike) -> NDArray:
        """Return the ids of images by index, (N,) unicode or int64."""

    @abstractmethod
    def load(self, index: int) -> Tensor:
        """Return the pixels of one image, (3, height, width) uint8, of the same size for the whole collection.

        Raises:
            UnreadableImageError: This image cannot be read; others may be readable.
            InputError: The collection cannot be read.
        """


class FolderImages(ImageCollection):
    """The images of a folder and its subfolders in the order of their paths, which are their ids."""

    def __init__(self, root: Path, image_size: ImageSize, interpolation: str) -> None:
        self.root = root
        self.image_size = image_size
        self.interpolation = interpolation
        files, _ = list_images(root)
        digest = hashlib.sha256(repr(str(root.resolve())).encode())
        for file in files:
            digest.update(repr(tuple(file)).encode())
        self.fingerprint = digest.hexdigest()
        try:
            # An array, not a list: reading a Python object copies its memory page in a forked worker.
            self.paths = np.array([file.path.encode() for file in files])
        except UnicodeEncodeError as error:
            raise InputError(f"{root}: holds a file name that is not UTF-8: {error.object!r}") from error

    def __len__(self) -> int:
        return len(self.paths)

    @override
    def ids(self, indices: ArrayLike) -> NDArray[np.str_]:
        return np.array([path.decode() for path in self.paths[np.asarray(indices)]], dtype=np.str_)

    @override
    def load(self, index: int) -> Tensor:
        path = self.root / self.paths[index].decode()
        return to_pixels(read_image_file(path), str(path), self.image_size, self.interpolation)


class MdsImages(ImageCollection):
    """A column of an MDS data set; an id is the sample's number. A shard is verified before its first use.

    Args:
        local: The data set, or the folder for the shards of a remote one.
        image_size: Images are resized to this many pixels a side.
        interpolation: bicubic or bilinear.
        column: The column that holds the images.
        remote: The address in an object store.
        cache_limit: The most bytes of shards in ``local``; ``None``: no limit.

    Raises:
        InputError: The data set cannot be used.
    """

    def __init__(
        self,
        local: Path,
        image_size: ImageSize,
        interpolation: str,
        column: str,
        remote: str | None = None,
        cache_limit: int | None = None,
    ) -> None:
        from d2v_composer.data.verified_dataset import VerifiedDataset  # Streaming and Composer: seconds

        self.name = remote or str(local)
        self.image_size = image_size
        self.interpolation = interpolation
        self.column = column
        if remote is not None:
            fetch_index(remote, local)
        shards = read_image_index(
            local, column, option="--column", source=self.name, shards_may_be_missing=remote is not None
        )
        if remote is not None:
            check_room([room_needed(shards, local, cache_limit)])
        place, other_column = remote or str(local.resolve()), "" if column == "image" else column
        contents = place.encode() + (local / INDEX).read_bytes() + other_column.encode()
        self.fingerprint = hashlib.sha256(contents).hexdigest()
        try:
            self.dataset = VerifiedDataset(
                local=local, remote=remote, cache_limit=cache_limit, batch_size=1, shuffle=False
            )
        except InputError:
            raise
        except (ShardError, ValueError) as error:  # the cache limit is too small for the shards
            raise InputError(f"{self.name}: {error}") from error
        keep_encoded(self.dataset.shards, column)

    def __len__(self) -> int:
        return self.dataset.num_samples

    @override
    def ids(self, indices: ArrayLike) -> NDArray[np.int64]:
        return np.asarray(indices, dtype=np.int64)

    @override
    def load(self, index: int) -> Tensor:
        try:
            stored = self.dataset[index][self.column]
        except ShardError as error:
            raise InputError(str(error)) from error
        return to_pixels(stored, f"sample {index} of {self.name}", self.image_size, self.interpolation)


class CifarImages(ImageCollection):
    """CIFAR-10 or CIFAR-100 in memory, 32 pixels a side; ids are train/00000, …, test/00000, …"""

    def __init__(self, root: Path, format: Format) -> None:
        train, test, _ = load_labelled_set(format, root, image_size=32, interpolation="bicubic")
        self.num_train = len(train.images)
        self.images = torch.cat([train.images, test.images])
        self.fingerprint = hashlib.sha256(self.images.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    @override
    def ids(self, indices: ArrayLike) -> NDArray[np.str_]:
        train = self.num_train
        names = [f"train/{i:05}" if i < train else f"test/{i - train:05}" for i in np.asarray(indices)]
        return np.array(names, dtype=np.str_)

    @override
    def load(self, index: int) -> Tensor:
        return self.images[index]


def open_collection(
    source: str,
    image_size: ImageSize,
    interpolation: str,
    *,
    local: Path | None = None,
    cache_limit: int | None = None,
    column: str | None = None,
) -> ImageCollection:
    """Open the images of any source.

    Args:
        source: A folder with an ``index.json`` or an object store's address: an MDS data set. A folder that holds, or
            is, ``cifar-10-batches-py`` or ``cifar-100-python``: CIFAR. Another folder: the images in it.
        image_size: Images are resized to this many pixels a side; CIFAR's keep their size.
        interpolation: Of that resizing: bicubic or bilinear, as the model's config says.
        local: The folder for the shards of a remote data set.
        cache_limit: The most bytes of shards in ``local``; default no limit.
        column: The column of an MDS data set that holds the images; default ``image``.

    Raises:
        InputError: The source is none of these, or cannot be used.
    """
    remote = is_remote(source)
    if remote and local is None:
        raise InputError(f"{source}: is remote: name a folder for its shards with --local")
    if not remote and (local is not None or cache_limit is not None):
        raise InputError(f"{source}: is local: --local and --cache-limit are for the shards of an object store")
    if local is not None:
        return MdsImages(local, image_size, interpolation, column or "image", source, cache_limit)
    root = Path(source)
    if not root.is_dir():
        raise InputError(f"{source}: {'is not a folder' if root.exists() else 'no such folder'}")
    if (root / INDEX).is_file():
        return MdsImages(root, image_size, interpolation, column or "image")
    if column is not None:
        raise InputError(f"{source}: has no {INDEX}: --column is for an MDS data set")
    cifar = [root.resolve()] if root.resolve().name in CIFAR_FORMATS else []
    cifar = cifar or [root / name for name in CIFAR_FORMATS if (root / name).is_dir()]
    if len(cifar) > 1:
        raise InputError(f"{source}: holds both CIFARs: give {cifar[0]} or {cifar[1]}")
    if cifar:
        return CifarImages(cifar[0].parent, CIFAR_FORMATS[cifar[0].name])
    return FolderImages(root, image_size, interpolation)
