"""Images in a fixed order, each with an id and none with a label: a folder's, an MDS data set's, CIFAR's."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10, CIFAR100
from typing_extensions import override

from d2v_composer.data.decode import decode_rgb, rgb_of, square, to_tensor
from d2v_composer.data.image_folder import list_images, read_image_file
from d2v_composer.data.labelled_sets import Format, load_labelled_set
from d2v_composer.data.mds_index import (
    INDEX,
    check_image_column,
    check_room,
    fetch_index,
    keep_encoded,
    read_index,
    room_needed,
)
from d2v_composer.data.verified_dataset import VerifiedDataset
from d2v_composer.data.verified_stream import ShardError
from d2v_composer.system.errors import InputError, UnreadableImageError
from d2v_composer.system.fetch import is_remote
from d2v_composer.system.worker_lifetime import end_with_parent

__all__ = ["Batch", "CifarImages", "FolderImages", "ImageCollection", "MdsImages", "load_batches", "open_collection"]

CIFAR_FOLDERS: dict[str, Format] = {CIFAR10.base_folder: "cifar10", CIFAR100.base_folder: "cifar100"}
STORE_TIMEOUT = 600.0


class ImageCollection(ABC):
    """Images in a fixed order.

    Attributes:
        fingerprint: Another one where the images are others, or may be.
    """

    fingerprint: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def ids(self, indices: NDArray[np.int64]) -> NDArray:
        """What the images at these places are called: (N,) unicode or int64, the same kind for a whole collection."""

    @abstractmethod
    def load(self, index: int) -> Tensor:
        """The pixels of one image, (3, height, width) uint8, all images of a collection in one size.

        Raises:
            UnreadableImageError: It cannot be read.
            InputError: Nor can others.
        """


class FolderImages(ImageCollection):
    """The images in a folder and its subfolders, in the order of their paths, which are their ids.

    Args:
        root: The folder.
        image_size: What they are resized to, in pixels a side.

    Raises:
        InputError: There are no images.
    """

    def __init__(self, root: Path, image_size: int) -> None:
        self.root = root
        self.image_size = image_size
        files, _ = list_images(root)
        digest = hashlib.sha256(repr(str(root.resolve())).encode())
        for file in files:
            digest.update(repr(tuple(file)).encode())
        self.fingerprint = digest.hexdigest()
        try:
            # One array, not a list: a forked worker that looks at a Python object makes a copy of its memory.
            self.paths = np.array([file.path.encode() for file in files])
        except UnicodeEncodeError as error:
            raise InputError(f"{root}: holds a file name that is not UTF-8: {error.object!r}") from error

    def __len__(self) -> int:
        return len(self.paths)

    @override
    def ids(self, indices: NDArray[np.int64]) -> NDArray[np.str_]:
        return np.array([path.decode() for path in self.paths[indices]], dtype=np.str_)

    @override
    def load(self, index: int) -> Tensor:
        path = self.root / self.paths[index].decode()
        return to_tensor(square(decode_rgb(read_image_file(path), str(path)), self.image_size))


class MdsImages(ImageCollection):
    """A column of an MDS data set, local or remote; an id is the sample's number.

    A shard is verified before its first use: see :class:`VerifiedDataset`.

    Args:
        local: The data set, or where the shards of a remote one are kept.
        image_size: What the images are resized to, in pixels a side.
        remote: Its address in an object store, or ``None``.
        cache_limit: What ``local`` may hold of a remote data set, in bytes; default all.
        column: Holds the images.

    Raises:
        InputError: It cannot be used.
    """

    def __init__(
        self,
        local: Path,
        image_size: int,
        remote: str | None = None,
        cache_limit: int | None = None,
        column: str = "image",
    ) -> None:
        self.name = remote or str(local)
        self.image_size = image_size
        if remote is not None:
            fetch_index(remote, local)
        shards = read_index(local, columns=(column,), option="--column", shards_may_be_missing=remote is not None)
        check_image_column(shards, column, self.name)
        if remote is not None:
            check_room([room_needed(shards, local, cache_limit)])
        where = remote or str(local.resolve())
        what = "" if column == "image" else column
        self.fingerprint = hashlib.sha256(where.encode() + (local / INDEX).read_bytes() + what.encode()).hexdigest()
        try:
            self.dataset = VerifiedDataset(
                local=local,
                remote=remote,
                timeout=STORE_TIMEOUT,
                cache_limit=cache_limit,
                shuffle_block_size=1,
                batch_size=1,
                shuffle=False,
                num_canonical_nodes=1,
            )
        except InputError:
            raise
        except (ShardError, ValueError) as error:  # the cache limit, which only the shards show to be too small
            raise InputError(f"{self.name}: {error}") from error
        keep_encoded(self.dataset.shards, column)
        self.column = column

    def __len__(self) -> int:
        return self.dataset.num_samples

    @override
    def ids(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return indices

    @override
    def load(self, index: int) -> Tensor:
        source = f"sample {index} of {self.name}"
        try:
            stored = self.dataset[index][self.column]
        except ShardError as error:
            raise InputError(str(error)) from error
        return to_tensor(square(rgb_of(stored, source), self.image_size))


class CifarImages(ImageCollection):
    """CIFAR-10 or CIFAR-100, in memory, of 32 pixels a side; ids are train/00000, …, test/00000, …

    Args:
        root: What torchvision takes for it.
        format: Which.

    Raises:
        InputError: It is damaged.
    """

    def __init__(self, root: Path, format: Format) -> None:
        train, test, _ = load_labelled_set(format, root, image_size=32)
        self.num_train = len(train.images)
        self.images = torch.cat([train.images, test.images])
        self.fingerprint = hashlib.sha256(self.images.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    @override
    def ids(self, indices: NDArray[np.int64]) -> NDArray[np.str_]:
        names = [f"train/{i:05}" if i < self.num_train else f"test/{i - self.num_train:05}" for i in indices]
        return np.array(names, dtype=np.str_)

    @override
    def load(self, index: int) -> Tensor:
        return self.images[index]


def open_collection(
    source: str,
    image_size: int,
    *,
    local: Path | None = None,
    cache_limit: int | None = None,
    column: str | None = None,
) -> ImageCollection:
    """The images of whatever it is.

    Args:
        source: A folder with an ``index.json`` or an object store's address: an MDS data set. A folder that holds, or
            is, ``cifar-10-batches-py`` or ``cifar-100-python``: CIFAR. Another folder: the images in it.
        image_size: What images of all kinds of sizes are resized to, in pixels a side; CIFAR's stay as they are.
        local: Where the shards of a remote data set are kept.
        cache_limit: What ``local`` may hold, in bytes; default all.
        column: Of an MDS data set, the one with the images; default ``image``.

    Raises:
        InputError: It is none of them, or cannot be used.
    """
    remote = is_remote(source)
    if remote and local is None:
        raise InputError(f"{source}: is remote: --local says in which folder its shards are kept")
    if not remote and (local is not None or cache_limit is not None):
        raise InputError(f"{source}: is local: --local and --cache-limit are for an object store's shards")
    if local is not None:
        return MdsImages(local, image_size, source, cache_limit, column or "image")
    root = Path(source)
    if not root.is_dir():
        raise InputError(f"{source}: {'is not a folder' if root.exists() else 'no such folder'}")
    if (root / INDEX).is_file():
        return MdsImages(root, image_size, column=column or "image")
    if column is not None:
        raise InputError(f"{source}: has no {INDEX}: --column is for an MDS data set")
    if root.resolve().name in CIFAR_FOLDERS:
        return CifarImages(root.resolve().parent, CIFAR_FOLDERS[root.resolve().name])
    cifar = [name for name in CIFAR_FOLDERS if (root / name).is_dir()]
    if len(cifar) > 1:
        raise InputError(f"{source}: holds both CIFARs: give {root / cifar[0]} or {root / cifar[1]}")
    return CifarImages(root, CIFAR_FOLDERS[cifar[0]]) if cifar else FolderImages(root, image_size)


class Batch(NamedTuple):
    """Images of one collection, in its order."""

    indices: Tensor
    """(B,) int64: their places in the collection."""
    images: Tensor
    """(B, 3, height, width) uint8; B is 0 where none could be read."""
    unreadable: list[str]
    """Why the others could not be read."""


class _Batches(Dataset[Batch]):
    """Whole batches by the range of their places."""

    def __init__(self, collection: ImageCollection) -> None:
        self.collection = collection

    def __getitem__(self, indices: range) -> Batch:
        read, images, unreadable = [], [], []
        for index in indices:
            try:
                images.append(self.collection.load(index))
                read.append(index)
            except UnreadableImageError as error:
                unreadable.append(str(error))
        pixels = torch.stack(images) if images else torch.empty(0, 3, 0, 0, dtype=torch.uint8)
        return Batch(torch.tensor(read, dtype=torch.int64), pixels, unreadable)


def load_batches(collection: ImageCollection, batches: Sequence[range], *, workers: int) -> DataLoader[Batch]:
    """Batches of images, decoded by worker processes, in the order in which they are asked for.

    Args:
        collection: Whose.
        batches: The places of each batch's images.
        workers: How many processes decode, each two batches ahead; 0: this one does.
    """
    return DataLoader(
        _Batches(collection),
        batch_size=None,  # they are batches already
        sampler=batches,
        num_workers=workers,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
    )


def _start_worker(_: int) -> None:
    end_with_parent()
