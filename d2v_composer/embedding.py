"""Embed a collection of images into one file; a kill costs at most one part of the work.

A run resumes at a whole number of batches, so that a batch does not depend on what was computed before it.
Shapes: N images, B images of a batch, D channels.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from d2v_composer.data.images import list_images, read_image_file, to_pixels
from d2v_composer.data.index import INDEX, fetch_index, keep_encoded, read_image_index
from d2v_composer.data.labeled import CIFAR_FOLDERS, Format, load_labeled_set, worker_options
from d2v_composer.models.encoder import ImageSize
from d2v_composer.models.execution import choose_precision
from d2v_composer.models.names import Pooling, PrecisionName, Representation
from d2v_composer.models.transformer import Transformer
from d2v_composer.system.command_line import progress_bar
from d2v_composer.system.errors import InputError, RunError, UnreadableImageError, reading, writing
from d2v_composer.system.fetch import is_remote
from d2v_composer.system.files import check_out_file, sole_user, write_atomically
from d2v_composer.system.machine import install_command

LOCK_SECONDS = 10.0  # the workers of a killed run exit within a second
ROW_GROUP = 4096  # of a Parquet file


class ImageCollection(NamedTuple):
    """Images in a fixed order."""

    ids: NDArray
    """The id of each image, (N,) unicode or int64. No list: a forked worker that reads its objects copies their memory.
    """
    fingerprint: str
    """A hash of everything that may change the images."""
    load: Callable[[int], Tensor]
    """Returns the pixels of an image by index, (3, height, width) uint8; raises UnreadableImageError."""


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
        local: The cache for the shards of a remote data set.
        cache_limit: Maximum size of the cache, in bytes; default no limit.
        column: The column of an MDS data set that holds the images; default ``image``.

    Raises:
        InputError: The source is none of these, or cannot be used.
    """
    if is_remote(source) == (local is None):
        raise InputError(f"{source}: --local is needed for an object store's shards, and for nothing else")
    root = Path(source)
    if local is not None or (root / INDEX).is_file():
        return _mds(source, local or root, cache_limit, column or "image", image_size, interpolation)
    if column is not None:
        raise InputError(f"{source}: has no {INDEX}: --column is for an MDS data set")
    for format, name in CIFAR_FOLDERS.items():
        for folder in (root / name, root.resolve()):
            if folder.name == name and folder.is_dir():
                return _cifar(folder.parent, format)
    return _folder(root, image_size, interpolation)


def _folder(root: Path, image_size: ImageSize, interpolation: str) -> ImageCollection:
    """Open a folder and its subfolders; the paths are the ids."""
    with reading(root):
        files, _ = list_images(root)
        described = [str(root.resolve()), *(f"{file.path} {file.num_bytes} {file.mtime_ns}" for file in files)]
        # A name that is not UTF-8 fails here, and not when Parquet is written.
        fingerprint = _sha256("\n".join(described).encode())
    paths = np.array([file.path for file in files])

    def load(index: int) -> Tensor:
        path = root / paths[index]
        return to_pixels(read_image_file(path), str(path), image_size, interpolation)

    return ImageCollection(paths, fingerprint, load)


def _mds(
    source: str, local: Path, cache_limit: int | None, column: str, image_size: ImageSize, interpolation: str
) -> ImageCollection:
    """Open a column of an MDS data set; the samples' numbers are the ids. A shard is verified before its first use."""
    from d2v_composer.data.shards import Shards  # Streaming: seconds

    remote = source if is_remote(source) else None
    if remote is not None:
        fetch_index(remote, local)
    read_image_index(local, column, option="--column", source=source, shards_may_be_missing=remote is not None)
    contents = (remote or str(local.resolve())).encode() + (local / INDEX).read_bytes() + column.encode()
    with reading(source):  # fails if the cache limit is too small for the shards
        samples = Shards(local=local, remote=remote, cache_limit=cache_limit)
    keep_encoded(samples.readers, column)

    def load(index: int) -> Tensor:
        return to_pixels(samples[index][column], f"sample {index} of {source}", image_size, interpolation)

    return ImageCollection(np.arange(len(samples)), _sha256(contents), load)


def _cifar(root: Path, format: Format) -> ImageCollection:
    """Read CIFAR-10 or CIFAR-100 into memory, 32 pixels per side; ids are train/00000, …, test/00000, …"""
    train, test, _ = load_labeled_set(format, root, image_size=32, interpolation="bicubic")
    images = torch.cat([train.images, test.images])
    counts = {"train": len(train.images), "test": len(test.images)}
    ids = np.array([f"{split}/{i:05}" for split, count in counts.items() for i in range(count)])
    return ImageCollection(ids, _sha256(images.numpy().tobytes()), images.__getitem__)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


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
    out: Path,
    options: EmbeddingOptions,
    *,
    device: str = "cpu",
    workers: int = 0,
    skip_unreadable: bool = False,
) -> Embedding:
    """Embed every image of a collection into a file, or resume an interrupted run.

    OUT appears when it is complete, and replaces an old one; NAME.ids.npy appears just before. Until then the rows are
    in a hidden folder next to it.

    Args:
        model: The model in eval mode, on the device.
        collection: The images.
        out: NAME.npy, (N, D), with the ids, (N,), in NAME.ids.npy; or NAME.parquet with the columns ``id`` and
            ``embedding``, a list of D numbers. See :func:`check_out`.
        options: The settings.
        device: cpu or cuda.
        workers: Processes that decode images.
        skip_unreadable: Skip and list unreadable images instead of stopping.

    Raises:
        InputError: An image is unreadable, an embedding is not finite, another process writes the file, or an
            interrupted run had other settings.
        RunError: The disk or a shard fails, or a worker was killed.
    """
    num_images, channels = len(collection.ids), model.encoder.config.embed_dim
    plan = {"model": hash_weights(model), "source": collection.fingerprint, "images": num_images, "device": device}
    plan |= {name: value for name, value in options._asdict().items() if name != "part_size"}
    part = max(1, options.part_size // options.batch_size)
    folder = _partial_folder(out)
    with writing(out), sole_user(folder / ".lock", LOCK_SECONDS) as alone:
        if not alone:
            raise InputError(f"{out}: another process is writing it")
        progress, rows = _start_or_resume(folder, plan, (num_images, channels), options.dtype)
        resumed, start = progress["images"], time.monotonic()
        batches = _load(collection, range(resumed, num_images), options.batch_size, workers)
        with progress_bar(total=num_images, initial=resumed, desc="embedding", unit="images") as bar:
            for number, (images, skipped) in enumerate(batches, 1):
                if skipped and not skip_unreadable:
                    raise InputError(f"{skipped[0][1]}; --skip-unreadable skips such images")
                if len(images):
                    embeddings = _embed(model, images, options, device)
                    if not np.isfinite(embeddings).all():
                        named = f"{collection.ids[progress['images']]}, or a later image of its batch"
                        how = f"--precision {options.precision} and --dtype {options.dtype}"
                        raise InputError(f"{named}: its embedding is not finite with {how}")
                    first = progress["images"] - len(progress["skipped"])
                    rows[first : first + len(images)] = embeddings
                progress["images"] += len(images) + len(skipped)
                progress["skipped"] += skipped
                if number % part == 0 or progress["images"] == num_images:
                    rows.flush()
                    write_atomically(folder / "progress.json", json.dumps(progress))
                bar.update(len(images) + len(skipped))
        seconds = time.monotonic() - start
        ids = np.delete(collection.ids, [index for index, _ in progress["skipped"]])
        _finish(rows[: len(ids)], ids, out, folder)
    reasons = [reason for _, reason in progress["skipped"]]
    return Embedding(len(ids), channels, reasons, resumed, seconds)


def check_out(out: Path, *, overwrite: bool) -> None:
    """Check, before the work begins, that embeddings can be written.

    Args:
        out: The file.
        overwrite: Accept one that exists.

    Raises:
        InputError: The suffix is unknown, the file exists, or it cannot be written.
    """
    if out.suffix not in (".npy", ".parquet"):
        raise InputError(f"{out}: must end in .npy or .parquet")
    if out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise InputError(f"{out}: .parquet needs pyarrow: {install_command('parquet', 'pyarrow')}")
    check_out_file(out, overwrite=overwrite)
    # With our folder next to it, the ids are ours: a run was killed between the two files.
    if out.suffix == ".npy" and not _partial_folder(out).exists():
        check_out_file(_ids_file(out), overwrite=overwrite)


def _partial_folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def _ids_file(out: Path) -> Path:
    return out.with_name(f"{out.stem}.ids.npy")


def _start_or_resume(
    folder: Path, plan: dict[str, Any], shape: tuple[int, int], dtype: str
) -> tuple[dict[str, Any], np.memmap]:
    """Return the progress, and the rows, (N, D), in a file. ``skipped`` has index and reason of unreadable images."""
    path, recorded = folder / "embeddings.npy", folder / "progress.json"
    progress = {"plan": plan, "images": 0, "skipped": []}
    if recorded.exists() and path.exists():
        progress = json.loads(recorded.read_bytes())
        if changed := [key.replace("_", " ") for key in plan if progress["plan"].get(key) != plan[key]]:
            another = f"an interrupted run had another {', '.join(changed)}"
            raise InputError(f"{folder}: {another}: delete that folder, or choose another OUT")
    else:
        npy.open_memmap(path, "w+", np.dtype(dtype), shape)
        with path.open("r+b") as file:
            # Reserve all blocks: a full disk is an error now, not a SIGBUS while the map is written.
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return progress, npy.open_memmap(path, "r+")


def _finish(rows: NDArray, ids: NDArray, out: Path, folder: Path) -> None:
    """Move the complete file to ``out``, replacing an old one, and remove the folder."""
    complete = folder / f"embeddings{out.suffix}"
    if out.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        embeddings = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
        table = pa.table({"id": pa.array(ids), "embedding": embeddings})
        # Hardly a number occurs twice: a dictionary of them would only take time.
        parquet.write_table(table, complete, row_group_size=ROW_GROUP, use_dictionary=False)
    else:
        with complete.open("r+b") as file:  # skipped images leave fewer rows than were reserved
            npy.write_array_header_1_0(file, npy.header_data_from_array_1_0(rows))
            file.truncate(file.tell() + rows.nbytes)
        np.save(folder / "ids.npy", ids)
        out.unlink(missing_ok=True)  # new ids must not be beside old embeddings
        (folder / "ids.npy").replace(_ids_file(out))
    complete.replace(out)
    shutil.rmtree(folder)


def _embed(model: Transformer, images: Tensor, options: EmbeddingOptions, device: str) -> NDArray:
    dtype = choose_precision(options.precision).autocast_dtype
    with torch.inference_mode(), torch.autocast(device, dtype, enabled=dtype is not None):
        embeddings = model.embed(images.to(device, non_blocking=True), options.pooling, options.representation)
        embeddings = normalize(embeddings, dim=1) if options.normalize else embeddings
        return embeddings.to(getattr(torch, options.dtype)).cpu().numpy()


def hash_weights(model: Transformer) -> str:
    """Return a hash of a model's sizes and weights; its file may be another one by now, that of a run in progress."""
    digest = hashlib.sha256(repr((model.encoder.config, model.config)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _load(
    collection: ImageCollection, indices: range, batch_size: int, workers: int
) -> Iterator[tuple[Tensor, list[tuple[int, str]]]]:
    """Yield batches of images, which the workers decode ahead, and the unreadable ones: index and reason."""

    def load_batch(indices: list[int]) -> tuple[Tensor, list[tuple[int, str]]]:
        images, skipped = [], []
        for index in indices:
            try:
                images.append(collection.load(index))
            except UnreadableImageError as error:
                skipped.append((index, str(error)))
        return torch.stack(images) if images else torch.empty(0), skipped

    loader = DataLoader(
        indices,  # pyright: ignore[reportArgumentType]: it has a length and items
        batch_size=batch_size,
        collate_fn=load_batch,
        **worker_options(workers, prefetch_factor=2),
    )
    try:
        yield from loader
    except (OSError, RuntimeError) as error:
        cause = str(error).strip().splitlines()[-1]  # a worker's error has its traceback before it
        if isinstance(error, RuntimeError) and not cause.startswith("DataLoader worker (pid"):
            raise
        raise RunError(f"the images cannot be read further ({cause}): the same command resumes") from error
