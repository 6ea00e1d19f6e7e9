"""Embed a collection of images into one file, a part after the other: a kill costs at most one part.

A part is a whole number of batches, so a batch does not depend on what was computed before it.
Shapes: N images, B images of a batch, D channels.
"""

import hashlib
import json
import math
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from d2v_composer.data.images import list_images, read_image_file, to_pixels
from d2v_composer.data.index import INDEX, check_room, fetch_index, keep_encoded, read_image_index, room_needed
from d2v_composer.data.labeled import CIFAR_FOLDERS, Format, load_labeled_set
from d2v_composer.models.encoder import ImageSize
from d2v_composer.models.execution import choose_precision
from d2v_composer.models.names import Pooling, PrecisionName, Representation
from d2v_composer.models.transformer import Transformer
from d2v_composer.system.command_line import progress_bar
from d2v_composer.system.errors import InputError, RunError, ShardError, UnreadableImageError, writing
from d2v_composer.system.fetch import is_remote
from d2v_composer.system.files import check_out_file, sole_user, write_atomically
from d2v_composer.system.machine import install_command
from d2v_composer.system.processes import die_with_parent

LOCK_SECONDS = 10.0  # the workers of a killed run exit within a second
ROW_GROUP = 4096  # of a Parquet file
CIFAR_FORMATS: dict[str, Format] = {folder: format for format, folder in CIFAR_FOLDERS.items()}
# Beginnings of torch's RuntimeErrors if a worker was killed, or /dev/shm or the open files ran short.
MACHINE_FAULTS = ("DataLoader worker (pid", "unable to write to file", "unable to open shared memory", "unable to mmap")


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
        self.root, self.image_size, self.interpolation = root, image_size, interpolation
        files, _ = list_images(root)
        described = [str(root.resolve()), *map(tuple, files)]
        self.fingerprint = hashlib.sha256(repr(described).encode()).hexdigest()
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
        image_size: Images are resized to this many pixels per side.
        interpolation: bicubic or bilinear.
        column: The column that holds the images.
        remote: The address in an object store.
        cache_limit: Maximum size of the shards in ``local``, in bytes; ``None``: no limit.

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
        from d2v_composer.data.shards import Shards  # Streaming: seconds

        self.name, self.column = remote or str(local), column
        self.image_size, self.interpolation = image_size, interpolation
        if remote is not None:
            fetch_index(remote, local)
        shards = read_image_index(
            local, column, option="--column", source=self.name, shards_may_be_missing=remote is not None
        )
        if remote is not None:
            check_room([room_needed(shards, local, cache_limit)])
        contents = (remote or str(local.resolve())).encode() + (local / INDEX).read_bytes() + column.encode()
        self.fingerprint = hashlib.sha256(contents).hexdigest()
        try:
            self.samples = Shards(local=local, remote=remote, cache_limit=cache_limit)
        except InputError:
            raise
        except (ShardError, ValueError) as error:  # the cache limit is too small for the shards
            raise InputError(f"{self.name}: {error}") from error
        keep_encoded(self.samples.readers, column)

    def __len__(self) -> int:
        return len(self.samples)

    @override
    def ids(self, indices: ArrayLike) -> NDArray[np.int64]:
        return np.asarray(indices, dtype=np.int64)

    @override
    def load(self, index: int) -> Tensor:
        stored = self.samples[index][self.column]
        return to_pixels(stored, f"sample {index} of {self.name}", self.image_size, self.interpolation)


class CifarImages(ImageCollection):
    """CIFAR-10 or CIFAR-100 in memory, 32 pixels per side; ids are train/00000, …, test/00000, …"""

    def __init__(self, root: Path, format: Format) -> None:
        train, test, _ = load_labeled_set(format, root, image_size=32, interpolation="bicubic")
        self.num_train = len(train.images)
        self.images = torch.cat([train.images, test.images])
        self.fingerprint = hashlib.sha256(self.images.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    @override
    def ids(self, indices: ArrayLike) -> NDArray[np.str_]:
        train = self.num_train
        return np.array([f"train/{i:05}" if i < train else f"test/{i - train:05}" for i in np.asarray(indices)])

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
        image_size: Images are resized to this many pixels per side; CIFAR's keep their size.
        interpolation: bicubic or bilinear, as the model's config says.
        local: The folder for the shards of a remote data set.
        cache_limit: Maximum size of the shards in ``local``, in bytes; default no limit.
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


def _write_header(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Write an .npy file's header; numpy pads it to the same length for any number of rows."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


class EmbeddingFile:
    """The file OUT: NAME.npy, (N, D), with the ids, (N,), in NAME.ids.npy; or NAME.parquet.

    Parquet has the columns ``id`` and ``embedding``, a list of D numbers. OUT appears when it is complete; NAME.ids.npy
    just before. Until then the rows are in :attr:`folder`, with a record of the progress, from which a killed run
    resumes.

    Args:
        out: The path.
        overwrite: Replace a file that exists, once the new one is complete.

    Raises:
        InputError: The suffix is unknown, the file exists, or it cannot be written.
    """

    def __init__(self, out: Path, *, overwrite: bool = False) -> None:
        if out.suffix not in (".npy", ".parquet"):
            raise InputError(f"{out}: must end in .npy or .parquet")
        if out.suffix == ".parquet" and find_spec("pyarrow") is None:
            raise InputError(f"{out}: .parquet needs pyarrow: {install_command('parquet', 'pyarrow')}")
        self.out, self.overwrite = out, overwrite
        self.ids = out.with_name(f"{out.stem}.ids.npy")
        self.folder = out.with_name(f".{out.name}.partial")
        self.num_images = 0
        """Images that are done: embedded or skipped."""
        self.skipped: list[tuple[int, str]] = []
        """The index of each unreadable image, and why it cannot be read."""
        self._check_absent()

    def _check_absent(self) -> None:
        check_out_file(self.out, overwrite=self.overwrite)
        # With our folder next to it, the ids are ours: a run was killed between the two files.
        if self.out.suffix == ".npy" and not self.folder.exists():
            check_out_file(self.ids, overwrite=self.overwrite)

    @contextmanager
    def open(self, plan: dict[str, Any], shape: tuple[int, int], dtype: str) -> Iterator[None]:
        """Lock the file in the block, and resume where an interrupted run of the same plan stopped.

        Args:
            plan: Everything that the embeddings depend on.
            shape: (N, D), if all images can be read.
            dtype: The type of the stored numbers.

        Raises:
            InputError: Another process writes the file, it exists by now, or an interrupted run had another plan.
            RunError: The disk is too small, or fails.
        """
        self._plan, self._rows, self._progress = plan, self.folder / "embeddings.npy", self.folder / "progress.json"
        with writing(self.out), sole_user(self.folder / ".lock", LOCK_SECONDS) as alone:
            if not alone:
                raise InputError(f"{self.out}: another process is writing it")
            self._check_absent()  # again: that process may have finished it
            progress: dict[str, Any] = {"images": 0}
            if self._progress.exists() and self._rows.exists():
                progress = json.loads(self._progress.read_bytes())
            if progress["images"]:
                changed = [key.replace("_", " ") for key in plan if progress["plan"].get(key) != plan[key]]
                if changed:
                    raise InputError(
                        f"{self.folder}: an interrupted run had another {', '.join(changed)}: delete that folder, or "
                        "choose another OUT"
                    )
                self.num_images, self.skipped = progress["images"], [(i, why) for i, why in progress["skipped"]]
            else:
                self._record()
                with self._rows.open("wb") as file:
                    _write_header(file, shape, np.dtype(dtype))
                    # Reserve all blocks: a full disk is an error now, not a SIGBUS while the map is written.
                    os.posix_fallocate(file.fileno(), 0, file.tell() + math.prod(shape) * np.dtype(dtype).itemsize)
            self._map = np.load(self._rows, mmap_mode="r+")
            yield

    def append(self, embeddings: NDArray, skipped: list[tuple[int, str]]) -> None:
        """Add the rows of the next images, (B, D), and record the progress.

        Args:
            embeddings: One row for each readable image.
            skipped: The unreadable images between them.
        """
        first = self.num_images - len(self.skipped)
        self._map[first : first + len(embeddings)] = embeddings
        self._map.flush()
        self.num_images += len(embeddings) + len(skipped)
        self.skipped += skipped
        self._record()

    def _record(self) -> None:
        progress = {"plan": self._plan, "images": self.num_images, "skipped": self.skipped}
        write_atomically(self._progress, json.dumps(progress))

    def finish(self, ids: Callable[[NDArray[np.int64]], NDArray]) -> int:
        """Move the complete file to OUT, replacing an old one, and remove the folder; return the number of rows.

        Args:
            ids: Return the ids of images by index.
        """
        readable = np.delete(np.arange(self.num_images), [index for index, _ in self.skipped])
        complete = self._rows
        if self.out.suffix == ".parquet":
            complete = self._write_parquet(readable, ids)
        else:
            np.save(self.folder / "ids.npy", ids(readable))
            if self.skipped:  # fewer rows than were reserved
                os.truncate(self._rows, self._map.offset + self._map[: len(readable)].nbytes)
                with self._rows.open("r+b") as file:
                    _write_header(file, (len(readable), self._map.shape[1]), self._map.dtype)
            self.out.unlink(missing_ok=True)  # new ids must not be beside old embeddings
            (self.folder / "ids.npy").replace(self.ids)
        complete.replace(self.out)
        shutil.rmtree(self.folder)
        return len(readable)

    def _write_parquet(self, readable: NDArray[np.int64], ids: Callable[[NDArray[np.int64]], NDArray]) -> Path:
        import pyarrow as pa
        from pyarrow import parquet

        path, channels = self.folder / "embeddings.parquet", self._map.shape[1]
        id_type = pa.int64() if ids(readable[:1]).dtype.kind == "i" else pa.string()
        number = pa.float16() if self._map.dtype == np.float16 else pa.float32()
        schema = pa.schema([("id", id_type), ("embedding", pa.list_(number, channels))])
        # Hardly a number occurs twice: a dictionary of them would only take time.
        with parquet.ParquetWriter(path, schema, use_dictionary=False) as writer:
            for first in range(0, len(readable), ROW_GROUP):
                group = readable[first : first + ROW_GROUP]
                numbers = pa.array(self._map[first : first + len(group)].ravel(), number)
                embeddings = pa.FixedSizeListArray.from_arrays(numbers, channels)
                columns = [pa.array(ids(group), id_type), embeddings]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
        return path


class EmbeddingOptions(NamedTuple):
    """Settings of a run; it resumes only with the same ones, except the part size."""

    pooling: Pooling = "cls"
    representation: Representation = "output"
    precision: PrecisionName = "fp32"
    normalize: bool = False
    """Scale embeddings to length 1."""
    dtype: str = "float32"
    """The type of the stored numbers: float32 or float16."""
    batch_size: int = 256
    """Images embedded at once; another number rounds differently."""
    part_size: int = 4096
    """Images between two records of the progress, rounded down to whole batches."""


class Embedding(NamedTuple):
    """The result of a run."""

    out: Path
    images: int
    channels: int
    skipped: list[str]
    """The reason for each unreadable image."""
    resumed: int
    """Images that an interrupted run had done."""
    seconds: float
    """Time for the other images."""


def embed_collection(
    model: Transformer,
    collection: ImageCollection,
    file: EmbeddingFile,
    options: EmbeddingOptions,
    *,
    device: str = "cpu",
    workers: int = 0,
    skip_unreadable: bool = False,
) -> Embedding:
    """Embed every image of a collection, or resume an interrupted run.

    Args:
        model: The model in eval mode, on the device.
        collection: The images.
        file: The file for embeddings and ids, in the collection's order.
        options: The settings.
        device: cpu or cuda.
        workers: Processes that decode images.
        skip_unreadable: Skip and list unreadable images instead of stopping.

    Raises:
        InputError: An image is unreadable, an embedding is not finite, or the file exists or belongs to an interrupted
            run with other settings.
        RunError: The disk or a shard fails, or a worker was killed.
    """
    num_images, channels = len(collection), model.encoder.config.embed_dim
    plan = {"model": hash_weights(model), "source": collection.fingerprint, "images": num_images, "device": device}
    plan |= {name: value for name, value in options._asdict().items() if name != "part_size"}
    with file.open(plan, (num_images, channels), options.dtype):
        if file.skipped and not skip_unreadable:
            raise InputError(f"{file.skipped[0][1]}; --skip-unreadable skips such images")
        resumed, start = file.num_images, time.monotonic()
        starts = range(resumed, num_images, options.batch_size)
        batches = [range(first, min(first + options.batch_size, num_images)) for first in starts]
        loaded = _load(collection, batches, workers, skip_unreadable)
        part = max(1, options.part_size // options.batch_size)
        with progress_bar(total=num_images, initial=resumed, desc="embedding", unit="images") as bar:
            for first in range(0, len(batches), part):
                images = (next(loaded) for _ in batches[first : first + part])
                embeddings, skipped = _embed_part(model, images, collection, options, device)
                file.append(embeddings, skipped)
                bar.update(len(embeddings) + len(skipped))
        seconds = time.monotonic() - start
        if len(file.skipped) == num_images:
            raise InputError(f"{file.out}: none of the {num_images} images can be read")
        num_rows = file.finish(collection.ids)
    return Embedding(file.out, num_rows, channels, [why for _, why in file.skipped], resumed, seconds)


def hash_weights(model: Transformer) -> str:
    """Return a hash of a model's sizes and weights; its file may be another one by now, that of a run in progress."""
    digest = hashlib.sha256(repr((model.encoder.config, model.config)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class _Batch(NamedTuple):
    indices: list[int]
    """The index of each readable image."""
    images: Tensor
    """(B, 3, height, width) uint8; B is 0 if none is readable."""
    unreadable: list[tuple[int, str]]


class _Batches(Dataset[_Batch]):
    """Batches by the range of their indices."""

    def __init__(self, collection: ImageCollection) -> None:
        self.collection = collection

    def __getitem__(self, indices: range) -> _Batch:
        images: dict[int, Tensor] = {}
        unreadable: list[tuple[int, str]] = []
        for index in indices:
            try:
                images[index] = self.collection.load(index)
            except UnreadableImageError as error:
                unreadable.append((index, str(error)))
        pixels = torch.stack([*images.values()]) if images else torch.empty(0, 3, 0, 0, dtype=torch.uint8)
        return _Batch([*images], pixels, unreadable)


def _load(collection: ImageCollection, batches: list[range], workers: int, skip_unreadable: bool) -> Iterator[_Batch]:
    """Yield the batches, which the workers decode ahead; faults of the machine become one line."""
    loader = DataLoader(
        _Batches(collection),
        batch_size=None,  # they are batches already
        sampler=batches,
        num_workers=workers,
        multiprocessing_context=get_context("fork") if workers else None,
        worker_init_fn=lambda _: die_with_parent(),
        pin_memory=torch.cuda.is_available(),
    )
    try:
        for batch in loader:
            if batch.unreadable and not skip_unreadable:
                raise InputError(f"{batch.unreadable[0][1]}; --skip-unreadable skips such images")
            yield batch
    except (OSError, RuntimeError) as error:
        cause = str(error).strip().splitlines()[-1]  # a worker's error has its traceback before it
        if isinstance(error, RuntimeError) and not cause.startswith(MACHINE_FAULTS):
            raise
        raise RunError(
            f"--workers {workers}: the images cannot be read further ({cause}): run the command again to resume, with "
            "fewer workers if memory or /dev/shm is short"
        ) from error


def _embed_part(
    model: Transformer,
    batches: Iterator[_Batch],
    collection: ImageCollection,
    options: EmbeddingOptions,
    device: str,
) -> tuple[NDArray, list[tuple[int, str]]]:
    autocast_dtype = choose_precision(options.precision).autocast_dtype
    indices: list[int] = []
    skipped: list[tuple[int, str]] = []
    embedded = [torch.empty(0, model.encoder.config.embed_dim, device=device)]
    with torch.inference_mode(), torch.autocast(device, autocast_dtype, enabled=autocast_dtype is not None):
        for batch in batches:
            if len(batch.images):
                images = batch.images.to(device, non_blocking=True)
                embedded.append(model.embed(images, options.pooling, options.representation))
            indices += batch.indices
            skipped += batch.unreadable
        embeddings = torch.cat(embedded)
        embeddings = normalize(embeddings, dim=1) if options.normalize else embeddings
        embeddings = embeddings.to(getattr(torch, options.dtype)).cpu()  # only here does the host wait for the device
    infinite = (~embeddings.isfinite().all(dim=1)).nonzero()
    if len(infinite):
        [name] = collection.ids([indices[int(infinite[0])]])
        raise InputError(
            f"{name}: its embedding is not finite with --precision {options.precision} and --dtype {options.dtype}"
        )
    return embeddings.numpy(), skipped
