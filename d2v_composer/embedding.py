"""Embed a collection of images into one file, a part after the other: a kill costs at most one part.

A batch never has images of two parts, so a part does not depend on what was computed before it.
Shapes: N images, B images of a batch, D channels.
"""

import hashlib
import io
import json
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike, NDArray
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from typing_extensions import override

from d2v_composer.data.images import list_images, read_image_file, to_pixels
from d2v_composer.data.index import INDEX, check_room, fetch_index, keep_encoded, read_image_index, room_needed
from d2v_composer.data.labeled import CIFAR_FOLDERS, Format, load_labeled_set
from d2v_composer.models.encoder import ImageSize
from d2v_composer.models.execution import choose_precision
from d2v_composer.models.names import Pooling, PrecisionName, Representation
from d2v_composer.models.transformer import Transformer
from d2v_composer.system.command_line import progress_bar
from d2v_composer.system.errors import InputError, ShardError, UnreadableImageError, reason
from d2v_composer.system.fetch import is_remote
from d2v_composer.system.files import check_out_file, sole_user, write_atomically
from d2v_composer.system.machine import install_command
from d2v_composer.system.processes import FORK

# MERGED FROM d2v_composer/embedding.py: Append embeddings to a file in a folder next to OUT, and move it to OUT

LOCK_TIMEOUT = 10  # the workers of a killed run end within a second
ROW_GROUP = 4096  # rows, or ids, that are in memory at a time

Ids = Callable[[NDArray[np.int64]], NDArray]
Unreadable = tuple[int, str]
"""The index of an image, and the reason why it cannot be read."""


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
        self.out = out
        self.overwrite = overwrite
        self.ids = out.with_name(f"{out.stem}.ids.npy")
        self.folder = out.with_name(f".{out.name}.partial")
        self.num_rows = 0
        self.skipped: list[Unreadable] = []
        self._refuse_existing()

    def _refuse_existing(self) -> None:
        check_out_file(self.out, overwrite=self.overwrite)
        # With our folder next to it, the ids are ours: a run was killed between the two files.
        if self.out.suffix == ".npy" and not self.folder.exists():
            check_out_file(self.ids, overwrite=self.overwrite)

    @property
    def num_images(self) -> int:
        """Images that are done: embedded or skipped."""
        return self.num_rows + len(self.skipped)

    @contextmanager
    def open(self, plan: dict[str, Any], channels: int, dtype: str) -> Iterator[None]:
        """Lock the file while the block lasts, and resume where an interrupted run of the same plan ended.

        Args:
            plan: Everything that the embeddings depend on.
            channels: D.
            dtype: The type of the stored numbers.

        Raises:
            InputError: Another process writes the file, it exists by now, or an interrupted run had another plan.
        """
        self.plan, self.channels, self.dtype = plan, channels, np.dtype(dtype)
        with ExitStack() as stack:
            with self._disk_errors():
                alone = stack.enter_context(sole_user(self.folder / ".lock", LOCK_TIMEOUT))
            if not alone:
                raise InputError(f"{self.out}: another process is writing it")
            self._refuse_existing()  # again: that process may have finished it
            self._resume()
            yield

    def append(self, embeddings: NDArray, skipped: Sequence[Unreadable]) -> None:
        """Add the rows of the next images, (B, D), and record the progress.

        Args:
            embeddings: One row for each readable image.
            skipped: The unreadable images between them.

        Raises:
            InputError: The disk is full or fails.
        """
        with self._disk_errors():
            with _synced(self._rows, "r+b") as file:
                file.seek(self._size(self.num_rows))
                file.write(embeddings.astype(self.dtype, copy=False).tobytes())
            self._record(self.num_rows + len(embeddings), [*self.skipped, *skipped])

    def rewind(self, num_images: int) -> None:
        """Drop what came after the first images, none of which was skipped."""
        with self._disk_errors():
            self._record(num_images, [])

    def finish(self, ids: Ids) -> None:
        """Move the complete file to OUT, replacing an old one, and remove the folder.

        Args:
            ids: Return the ids of images by index.

        Raises:
            InputError: The disk is full or fails.
        """
        readable = np.delete(np.arange(self.num_images), [index for index, _ in self.skipped])
        chunks = [readable[first : first + ROW_GROUP] for first in range(0, self.num_rows, ROW_GROUP)]
        with self._disk_errors():
            if self.out.suffix == ".npy":
                self._write_ids(chunks, ids)
                complete = self._complete_npy()
            else:
                complete = self._write_parquet(chunks, ids)
            complete.replace(self.out)
            shutil.rmtree(self.folder)

    @property
    def _rows(self) -> Path:
        """An .npy file without its header, which is written when the number of rows is known."""
        return self.folder / "embeddings.npy"

    @property
    def _progress(self) -> Path:
        return self.folder / "progress.json"

    def _size(self, num_rows: int) -> int:
        header = len(_npy_header((num_rows, self.channels), self.dtype))
        return header + num_rows * self.channels * self.dtype.itemsize

    def _resume(self) -> None:
        progress: dict[str, Any] = {"plan": self.plan, "rows": 0, "skipped": []}
        if self._progress.is_file():
            progress = json.loads(self._progress.read_bytes())
        num_rows, skipped = progress["rows"], [(index, why) for index, why in progress["skipped"]]
        changed = [key.replace("_", " ") for key, value in self.plan.items() if progress["plan"].get(key) != value]
        if changed and (num_rows or skipped):
            raise InputError(
                f"{self.folder}: an interrupted run had another {', '.join(changed)}: delete that folder, or choose "
                "another OUT"
            )
        with self._disk_errors():
            self._rows.touch()
            if num_rows and self._rows.stat().st_size < self._size(num_rows):  # the rows were deleted
                num_rows, skipped = 0, []
            self._record(num_rows, skipped)

    def _record(self, num_rows: int, skipped: list[Unreadable]) -> None:
        write_atomically(self._progress, json.dumps({"plan": self.plan, "rows": num_rows, "skipped": skipped}))
        self.num_rows, self.skipped = num_rows, skipped

    def _write_ids(self, chunks: list[NDArray[np.int64]], ids: Ids) -> None:
        dtype = np.result_type(*(ids(chunk).dtype for chunk in chunks))  # unicode is as wide as its longest string
        partial = self.folder / "ids.npy"
        with _synced(partial, "wb") as file:
            file.write(_npy_header((self.num_rows,), dtype))
            for chunk in chunks:
                file.write(ids(chunk).astype(dtype, copy=False).tobytes())
        self.out.unlink(missing_ok=True)  # new ids must not lie beside old embeddings
        partial.replace(self.ids)

    def _complete_npy(self) -> Path:
        with _synced(self._rows, "r+b") as file:
            file.write(_npy_header((self.num_rows, self.channels), self.dtype))
            file.truncate(self._size(self.num_rows))
        return self._rows

    def _write_parquet(self, chunks: list[NDArray[np.int64]], ids: Ids) -> Path:
        import pyarrow as pa
        from pyarrow import parquet

        id_type = pa.int64() if ids(chunks[0]).dtype.kind == "i" else pa.string()
        number = pa.float16() if self.dtype == np.float16 else pa.float32()
        schema = pa.schema([("id", id_type), ("embedding", pa.list_(number, self.channels))])
        path, offset = self.folder / "embeddings.parquet", self._size(0)
        with (
            _synced(path, "wb") as file,
            # Hardly a number occurs twice: a dictionary of them would only take time.
            parquet.ParquetWriter(file, schema, use_dictionary=False) as writer,
        ):
            for chunk in chunks:
                numbers = np.fromfile(self._rows, self.dtype, count=len(chunk) * self.channels, offset=offset)
                offset += numbers.nbytes
                embeddings = pa.FixedSizeListArray.from_arrays(pa.array(numbers, number), self.channels)
                writer.write_table(pa.Table.from_arrays([pa.array(ids(chunk), id_type), embeddings], schema=schema))
        return path

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{self.out}: cannot be written ({reason(error)})") from error


@contextmanager
def _synced(path: Path, mode: str) -> Iterator[IO[bytes]]:
    with open(path, mode) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _npy_header(shape: tuple[int, ...], dtype: DTypeLike) -> bytes:
    """Return the beginning of an .npy file; numpy pads it to the same length for any number of rows."""
    buffer = io.BytesIO()
    description = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(buffer, {"descr": description, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


# MERGED FROM d2v_composer/embedding.py: Read images in a fixed order, each with an id: those of a folder, of an

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
        from d2v_composer.data.shards import Shards  # Streaming: seconds

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
        try:
            stored = self.samples[index][self.column]
        except ShardError as error:
            raise InputError(str(error)) from error
        return to_pixels(stored, f"sample {index} of {self.name}", self.image_size, self.interpolation)


class CifarImages(ImageCollection):
    """CIFAR-10 or CIFAR-100 in memory, 32 pixels a side; ids are train/00000, …, test/00000, …"""

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


# Beginnings of torch's RuntimeErrors if a worker was killed, or /dev/shm or the open files ran short.
MACHINE_FAULTS = ("DataLoader worker (pid", "unable to write to file", "unable to open shared memory", "unable to mmap")


class EmbeddingOptions(NamedTuple):
    """Settings that change the embeddings: a run resumes only with the same ones."""

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
    """Images between two records of the progress."""


class Embedding(NamedTuple):
    """The result of a run."""

    out: Path
    images: int
    channels: int
    skipped: list[str]
    """The reason of each unreadable image."""
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
        InputError: An image is unreadable, an embedding is not finite, or the file cannot be written, exists, or
            belongs to an interrupted run with other settings.
    """
    plan = {
        "model": hash_weights(model),
        "source": collection.fingerprint,
        "images": len(collection),
        "device": device,
        **options._asdict(),
    }
    channels = model.encoder.config.embed_dim
    with file.open(plan, channels, options.dtype):
        if file.skipped and not skip_unreadable:
            file.rewind(file.skipped[0][0] // options.part_size * options.part_size)
        resumed, start = file.num_images, time.monotonic()
        parts = _embed_parts(model, collection, resumed, options, device, workers, skip_unreadable)
        try:
            for embeddings, skipped in parts:
                file.append(embeddings, skipped)
        except KeyboardInterrupt:
            done = f"{file.num_images} of {len(collection)} images are done"
            raise KeyboardInterrupt(f"{done}, the same command resumes") from None
        seconds = time.monotonic() - start
        if not file.num_rows:
            raise InputError(f"{file.out}: none of the {len(collection)} images can be read")
        file.finish(collection.ids)
    return Embedding(file.out, file.num_rows, channels, [reason for _, reason in file.skipped], resumed, seconds)


def hash_weights(model: Transformer) -> str:
    """Return a hash of a model's sizes and weights; its file may be another one by now, that of a run in progress."""
    digest = hashlib.sha256(repr((model.encoder.config, model.config)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _embed_parts(
    model: Transformer,
    collection: ImageCollection,
    first: int,
    options: EmbeddingOptions,
    device: str,
    workers: int,
    skip_unreadable: bool,
) -> Iterator[tuple[NDArray, list[Unreadable]]]:
    """Yield the parts from an image on; meanwhile the workers decode the next ones."""
    images, step = range(len(collection)), options.batch_size
    parts = [images[start : start + options.part_size] for start in range(first, len(images), options.part_size)]
    batches = [[part[start : start + step] for start in range(0, len(part), step)] for part in parts]
    if not parts:
        return
    loader = DataLoader(
        _Batches(collection),
        batch_size=None,  # they are batches already
        sampler=list(chain.from_iterable(batches)),
        num_workers=workers,
        multiprocessing_context=FORK if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    loaded = _one_line_errors(loader, workers)
    with progress_bar(total=len(images), initial=first, desc="embedding", unit="images") as bar:
        for part in batches:
            of_part = _readable(islice(loaded, len(part)), skip_unreadable, bar)
            yield _embed_part(model, of_part, collection, options, device)


def _one_line_errors(loader: DataLoader, workers: int) -> Iterator["_Batch"]:
    """Yield the batches; faults of the machine that end a worker become one line."""
    try:
        yield from loader
    except (OSError, RuntimeError) as error:
        cause = str(error).strip().splitlines()[-1]  # a worker's error has its traceback before it
        if isinstance(error, RuntimeError) and not cause.startswith(MACHINE_FAULTS):
            raise
        raise InputError(
            f"--workers {workers}: the images cannot be read further ({cause}): run the command again to resume, with "
            "fewer workers if memory or /dev/shm is short"
        ) from error


class _Batch(NamedTuple):
    indices: list[int]
    """The index of each readable image."""
    images: Tensor
    """(B, 3, height, width) uint8; B is 0 if none is readable."""
    unreadable: list[Unreadable]


class _Batches(Dataset[_Batch]):
    """Batches by the range of their indices."""

    def __init__(self, collection: ImageCollection) -> None:
        self.collection = collection

    def __getitem__(self, indices: range) -> _Batch:
        images: dict[int, Tensor] = {}
        unreadable: list[Unreadable] = []
        for index in indices:
            try:
                images[index] = self.collection.load(index)
            except UnreadableImageError as error:
                unreadable.append((index, str(error)))
        pixels = torch.stack([*images.values()]) if images else torch.empty(0, 3, 0, 0, dtype=torch.uint8)
        return _Batch([*images], pixels, unreadable)


def _readable(batches: Iterator[_Batch], skip_unreadable: bool, bar: tqdm) -> Iterator[_Batch]:
    for batch in batches:
        if batch.unreadable and not skip_unreadable:
            raise InputError(f"{batch.unreadable[0][1]}; --skip-unreadable skips such images")
        yield batch
        bar.update(len(batch.indices) + len(batch.unreadable))


def _embed_part(
    model: Transformer,
    batches: Iterator[_Batch],
    collection: ImageCollection,
    options: EmbeddingOptions,
    device: str,
) -> tuple[NDArray, list[Unreadable]]:
    autocast_dtype = choose_precision(options.precision).autocast_dtype
    indices: list[int] = []
    skipped: list[Unreadable] = []
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
