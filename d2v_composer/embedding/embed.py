"""A collection of images to one file of embeddings, in parts, so that an interruption costs at most one of them.

Parts are kept in a folder beside the file until all are there. A batch never has images of two parts, so what is in a
part depends on nothing that was computed before it.
Shapes: N images, B images of a batch, D channels.
"""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from d2v_composer.embedding.collection import Batch, ImageCollection, load_batches
from d2v_composer.embedding.output_file import EmbeddingFile, Part, read_skipped, write_part
from d2v_composer.models.transformer import Pooling, Representation, Transformer
from d2v_composer.system.atomic_files import write_atomically
from d2v_composer.system.errors import InputError
from d2v_composer.system.file_locks import sole_user

__all__ = ["DTYPES", "PRECISIONS", "Embedding", "EmbeddingOptions", "embed_collection"]

PLAN = "plan.json"
LOCK_TIMEOUT = 10  # the workers of a run that was just killed see it within a second
DTYPES = ("float32", "float16")
Precision = Literal["fp32", "amp_bf16", "amp_fp16"]
PRECISIONS: dict[Precision, torch.dtype | None] = {
    "fp32": None,
    "amp_bf16": torch.bfloat16,
    "amp_fp16": torch.float16,
}


class EmbeddingOptions(NamedTuple):
    """How images become embeddings: what each part of a file must have in common with the others."""

    pooling: Pooling = "cls"
    representation: Representation = "output"
    precision: Precision = "fp32"
    normalize: bool = False
    """Whether embeddings get length 1."""
    dtype: str = "float32"
    """How they are stored: float32 or float16."""
    batch_size: int = 256
    """Images embedded at once; another number gives other roundings."""
    part_size: int = 4096
    """Images between two points from which an interrupted run can go on."""


class Embedding(NamedTuple):
    """What was written."""

    out: Path
    images: int
    channels: int
    skipped: list[str]
    """The unreadable ones, with the reason."""
    resumed: int
    """How many of the images had been embedded before an interruption."""
    seconds: float
    """What embedding the others took."""


def embed_collection(
    model: Transformer,
    collection: ImageCollection,
    file: EmbeddingFile,
    options: EmbeddingOptions,
    *,
    model_hash: str,
    device: str = "cpu",
    workers: int = 0,
    skip_unreadable: bool = False,
) -> Embedding:
    """Embed every image of a collection, or the rest where the same was interrupted.

    Args:
        model: In eval mode, on the device.
        collection: The images.
        file: Where embeddings and ids go, in the collection's order.
        options: How.
        model_hash: What tells the model from others.
        device: cpu or cuda.
        workers: How many processes decode images.
        skip_unreadable: Whether unreadable images are left out, and named, instead of ending the run.

    Raises:
        InputError: An image is unreadable, an embedding not finite, or the file cannot be written, is there already,
            or has parts of something else beside it.
    """
    plan = {
        "model": model_hash,
        "source": collection.fingerprint,
        "images": len(collection),
        "device": device,
        **options._asdict(),
    }
    with _sole_writer(file):
        whole = _resume(file.folder, plan, skip_unreadable)
        parts = [file.folder / f"part-{number:06}.npz" for number in range(-(-len(collection) // options.part_size))]
        missing = [number for number, path in enumerate(parts) if path not in whole]
        start = time.monotonic()
        for number, part in _embed_parts(model, collection, missing, options, device, workers, skip_unreadable):
            write_part(parts[number], part)
        seconds = time.monotonic() - start
        skipped = [line for path in parts for line in read_skipped(path)]
        if len(skipped) == len(collection):
            raise InputError(f"{file.out}: none of the {len(collection)} images can be read")
        file.assemble(parts, options.dtype)
        shutil.rmtree(file.folder)
    num_now = sum(len(_part(collection, number, options)) for number in missing)
    return Embedding(
        out=file.out,
        images=len(collection) - len(skipped),
        channels=model.encoder.config.embed_dim,
        skipped=skipped,
        resumed=len(collection) - num_now,
        seconds=seconds,
    )


@contextmanager
def _sole_writer(file: EmbeddingFile) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            alone = stack.enter_context(sole_user(file.folder / ".lock", LOCK_TIMEOUT))
        except OSError as error:
            raise InputError(f"{file.out}: cannot be written ({error.strerror})") from error
        if not alone:
            raise InputError(f"{file.out}: another process is writing it")
        file.refuse_existing()  # again: that process may have finished it
        yield


def _resume(folder: Path, plan: dict[str, Any], skip_unreadable: bool) -> set[Path]:
    """The whole parts that an interrupted run of the same plan has left."""
    parts = set(folder.glob("part-*.npz"))
    if parts:
        before = json.loads((folder / PLAN).read_bytes())
        others = [key.replace("_", " ") for key, value in plan.items() if before.get(key) != value]
        if others:
            raise InputError(
                f"{folder}: has parts made with another {', '.join(others)}: delete that folder, or choose another OUT"
            )
    write_atomically(folder / PLAN, json.dumps(plan))
    return {path for path in parts if skip_unreadable or not read_skipped(path)}


def _part(collection: ImageCollection, number: int, options: EmbeddingOptions) -> range:
    """The places of a part's images."""
    return range(len(collection))[number * options.part_size : (number + 1) * options.part_size]


def _embed_parts(
    model: Transformer,
    collection: ImageCollection,
    numbers: Sequence[int],
    options: EmbeddingOptions,
    device: str,
    workers: int,
    skip_unreadable: bool,
) -> Iterator[tuple[int, Part]]:
    """Some parts by number; meanwhile the workers are busy with the next."""
    step = options.batch_size
    batches = {
        number: [part[first : first + step] for first in range(0, len(part), step)]
        for number in numbers
        for part in [_part(collection, number, options)]
    }
    all_batches = [*chain.from_iterable(batches.values())]
    loaded = iter(load_batches(collection, all_batches, workers=workers) if numbers else ())
    initial = len(collection) - sum(map(len, all_batches))
    with tqdm(total=len(collection), initial=initial, desc="embedding", unit="img", disable=None, leave=False) as bar:
        for number in numbers:
            of_part = _readable(islice(loaded, len(batches[number])), skip_unreadable, bar)
            yield number, _embed_part(model, of_part, collection, options, device)


def _readable(batches: Iterator[Batch], skip_unreadable: bool, bar: tqdm) -> Iterator[Batch]:
    for batch in batches:
        if batch.unreadable and not skip_unreadable:
            raise InputError(f"{batch.unreadable[0]}; --skip-unreadable leaves such images out")
        yield batch
        bar.update(len(batch.indices) + len(batch.unreadable))


def _embed_part(
    model: Transformer,
    batches: Iterator[Batch],
    collection: ImageCollection,
    options: EmbeddingOptions,
    device: str,
) -> Part:
    autocast_dtype = PRECISIONS[options.precision]
    indices, skipped = [], []
    embedded = [torch.empty(0, model.encoder.config.embed_dim, device=device)]
    with torch.inference_mode(), torch.autocast(device, autocast_dtype, enabled=autocast_dtype is not None):
        for batch in batches:
            if len(batch.images):
                images = batch.images.to(device, non_blocking=True)
                embedded.append(model.embed(images, options.pooling, options.representation))
            indices.append(batch.indices)
            skipped += batch.unreadable
        embeddings = torch.cat(embedded)
        embeddings = normalize(embeddings, dim=1) if options.normalize else embeddings
        embeddings = embeddings.to(getattr(torch, options.dtype)).cpu()  # only here does the host wait for the device
    ids = collection.ids(torch.cat(indices).numpy())
    finite = embeddings.isfinite().all(dim=1)
    if not finite.all():
        raise InputError(
            f"{ids[~finite.numpy()][0]}: its embedding is not finite with --precision {options.precision} and --dtype "
            f"{options.dtype}"
        )
    return Part(ids, embeddings.numpy(), skipped)
