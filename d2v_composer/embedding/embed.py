"""Embed a collection of images into one file, a part after the other: a kill costs at most one part.

A batch never has images of two parts, so a part does not depend on what was computed before it.
Shapes: N images, B images of a batch, D channels.
"""

import hashlib
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from d2v_composer.embedding.collection import ImageCollection
from d2v_composer.embedding.output_file import EmbeddingFile, Unreadable
from d2v_composer.models.names import Pooling, PrecisionName, Representation
from d2v_composer.models.precision import choose_precision
from d2v_composer.models.transformer import Transformer
from d2v_composer.system.errors import InputError, UnreadableImageError
from d2v_composer.system.progress import progress_bar
from d2v_composer.system.worker_lifetime import FORK

__all__ = ["Embedding", "EmbeddingOptions", "embed_collection"]

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
