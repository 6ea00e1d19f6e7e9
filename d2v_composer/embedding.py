"""Embed a collection of images or clips into one file; a killed run loses at most one part of its work.

A run resumes at a whole number of batches, so that a batch does not depend on what was computed before it.
Shapes: N samples, D channels.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from d2v_composer.data.index import INDEX, fetch_index, is_mds, read_index
from d2v_composer.data.labeled import map_in_workers
from d2v_composer.data.modality import Modality, collate, list_files, read_sample_file
from d2v_composer.data.shards import Shards
from d2v_composer.models.backbone import Backbone
from d2v_composer.models.execution import choose_precision
from d2v_composer.models.names import Pooling, PrecisionName, Representation
from d2v_composer.models.precision import precision_of
from d2v_composer.system.errors import InputError, UnreadableSampleError, reading, writing
from d2v_composer.system.fetch import is_remote
from d2v_composer.system.files import check_out_file, sole_user, write_atomically
from d2v_composer.system.progress import progress_bar

LOCK_SECONDS = 10.0  # the workers of a killed run exit within a second
PART = 1024  # samples between two records of the progress
HEADER_BYTES = 128  # of a .npy file with an array of two dimensions


class SampleCollection(NamedTuple):
    """Samples in a fixed order."""

    unit: str
    """What several are called: images or clips."""
    ids: NDArray
    """Id of each one, (N,) unicode or int64. Not a list: a forked worker that reads its objects copies their memory."""
    source: str
    """Hash of where the samples are, and of an MDS data set's index."""
    marks: NDArray[np.int64]
    """A number for each sample, (N,), that is another one if its file changes."""
    load: Callable[[int], Tensor]
    """Returns a sample by index, as :meth:`Modality.decode` does; raises UnreadableSampleError."""
    others: Mapping[str, int] = {}
    """Number of files that are left out, by kind."""


def open_collection(
    source: str,
    modality: Modality,
    *,
    local: Path | None = None,
    cache_limit: int | None = None,
    column: str | None = None,
) -> SampleCollection:
    """Open the images or clips of any source.

    Args:
        source: A folder with an MDS ``index.json`` or an object store's address: an MDS data set, whose ids are the
            samples' numbers. Another folder: the files in it and its subfolders, whose ids are their paths.
        modality: What the samples are.
        local: The cache for the shards of a remote data set.
        cache_limit: Maximum size of the cache, in bytes; default no limit.
        column: The column of an MDS data set that holds the samples; default: the modality's name.

    Raises:
        InputError: The source cannot be used.
    """
    if is_remote(source) == (local is None):
        raise InputError(f"{source}: --local is needed for an object store's shards, and for nothing else")
    root, column = local or Path(source), column or modality.name
    if local is not None:
        fetch_index(source, local)
    elif not is_mds(root):
        with reading(root):
            files, others = list_files(root, modality)
        paths = np.array([file.path for file in files])
        marks = np.array([int(_sha256(file)[:15], 16) for file in files])

        def load_file(index: int) -> Tensor:
            path = root / paths[index]
            return modality.decode(read_sample_file(path), str(path))

        return SampleCollection(modality.unit, paths, _sha256(root.resolve()), marks, load_file, others)

    read_index(root, column, modality, option="--column", source=source, shards_may_be_missing=local is not None)
    with reading(source):  # fails if the cache limit is too small for the shards
        samples = Shards(local=root, remote=local and source, columns=[column], cache_limit=cache_limit)

    def load_sample(index: int) -> Tensor:
        return modality.decode(samples[index][column], f"sample {index} of {source}")

    contents = _sha256(source if local else root.resolve(), (root / INDEX).read_bytes(), column)
    ids = np.arange(len(samples))
    return SampleCollection(modality.unit, ids, contents, ids, load_sample)


def _sha256(*contents: object) -> str:
    return hashlib.sha256(repr(contents).encode()).hexdigest()


class EmbeddingOptions(NamedTuple):
    """Settings of a run, which resumes only with the same settings."""

    pooling: Pooling = "cls"
    representation: Representation = "output"
    precision: PrecisionName = "fp32"
    normalize: bool = False
    """Scale embeddings to length 1."""
    dtype: str = "float32"
    """Type of the stored numbers: float32 or float16."""
    batch_size: int = 256
    """Samples per batch; another batch size rounds differently."""


class Embedding(NamedTuple):
    """Result of a run."""

    images: int
    channels: int
    skipped: list[str]
    """Why each unreadable sample was skipped."""
    resumed: int
    """Number of samples that an interrupted run had embedded."""
    seconds: float
    """Time taken by the other samples."""


def embed_collection(
    model: Backbone,
    collection: SampleCollection,
    out: Path,
    options: EmbeddingOptions,
    *,
    device: str = "cpu",
    workers: int = 0,
    skip_unreadable: bool = False,
) -> Embedding:
    """Embed every sample of a collection into a file, or resume an interrupted run.

    OUT appears when it is complete, and replaces an old one; NAME.ids.npy appears just before. Until then the rows are
    in a hidden folder next to it. If files of the source changed, came or went, a run resumes before the first of them.

    Args:
        model: The model in eval mode, on the device.
        collection: The samples.
        out: NAME.npy, (N, D), with the ids, (N,), in NAME.ids.npy. See :func:`check_out`.
        options: The settings.
        device: cpu or cuda.
        workers: Processes that decode samples.
        skip_unreadable: Skip and list unreadable samples instead of stopping.

    Raises:
        InputError: A sample is unreadable, an embedding is not finite, another process writes the file, or an
            interrupted run had other settings.
        RunError: The disk or a shard fails, or a worker was killed.
    """
    num_images, channels = len(collection.ids), model.embed_dim
    plan = {"model": hash_weights(model), "source": collection.source, "device": device, **options._asdict()}
    folder, size = _partial_folder(out), options.batch_size
    with writing(out), sole_user(folder / ".lock", LOCK_SECONDS) as alone:
        if not alone:
            raise InputError(f"{out}: another process is writing it")
        progress, rows = _start_or_resume(folder, plan, collection, channels)
        resumed, start = progress["images"], time.monotonic()
        batches = [range(first, min(first + size, num_images)) for first in range(resumed, num_images, size)]
        loaded = map_in_workers(partial(_load, collection), batches, workers, device == "cuda")
        with progress_bar(total=num_images, initial=resumed, desc="embedding", unit=collection.unit) as bar:
            for batch, (inputs, skipped) in zip(batches, loaded, strict=True):
                if skipped and not skip_unreadable:
                    raise InputError(f"{skipped[0][1]}; --skip-unreadable skips such {collection.unit}")
                if inputs:
                    embeddings = _embed(model, inputs, options, device)
                    if not np.isfinite(embeddings).all():
                        named = f"{collection.ids[batch.start]}, or one after it in its batch"
                        how = f"--precision {options.precision} and --dtype {options.dtype}"
                        raise InputError(f"{named}: its embedding is not finite with {how}")
                    first = batch.start - len(progress["skipped"])
                    rows[first : first + len(embeddings)] = embeddings
                progress["skipped"] += skipped
                if batch.stop - progress["images"] >= PART or batch is batches[-1]:
                    progress["images"] = batch.stop
                    rows.flush()
                    write_atomically(folder / "progress.json", json.dumps(progress))
                bar.update(len(batch))
        seconds = time.monotonic() - start
        ids = np.delete(collection.ids, [index for index, _ in progress["skipped"]])
        del rows  # Windows renames no file that is mapped, and removes none that is open, such as the lock
        _finish((len(ids), channels), np.dtype(options.dtype), ids, out, folder)
    with suppress(OSError):
        folder.rmdir()
    return Embedding(len(ids), channels, [reason for _, reason in progress["skipped"]], resumed, seconds)


def check_out(out: Path, *, overwrite: bool) -> None:
    """Check, before the work starts, that embeddings can be written.

    Raises:
        InputError: The suffix is not .npy, the file exists, or it cannot be written.
    """
    if out.suffix != ".npy":
        raise InputError(f"{out}: must end in .npy")
    check_out_file(out, overwrite=overwrite)
    # With our folder next to it, the ids are ours: a run was killed between the two files.
    check_out_file(_ids_file(out), overwrite=overwrite or _partial_folder(out).exists())


def _partial_folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def _ids_file(out: Path) -> Path:
    return out.with_suffix(".ids.npy")


def _start_or_resume(
    folder: Path, plan: dict[str, Any], collection: SampleCollection, channels: int
) -> tuple[dict[str, Any], np.memmap]:
    """Return the progress and the rows, (N, D), of the file; ``skipped`` lists unreadable samples: index and reason."""
    path, recorded, listed = (folder / name for name in ("embeddings.npy", "progress.json", "marks"))
    progress, marks, size = {"plan": plan, "images": 0, "skipped": []}, collection.marks, plan["batch_size"]
    if recorded.exists() and path.exists():
        progress = json.loads(recorded.read_bytes())
        if changed := [key.replace("_", " ") for key in plan if progress["plan"].get(key) != plan[key]]:
            another = f"an interrupted run had a different {', '.join(changed)}"
            raise InputError(f"{folder}: {another}; delete that folder, or choose another OUT")
        before = np.frombuffer(listed.read_bytes(), np.int64)
        if not np.array_equal(before, marks):
            both = min(len(before), len(marks))
            num_same = int(np.append(before[:both] != marks[:both], True).argmax())
            kept = min(num_same, progress["images"]) // size * size  # whole batches
            progress |= {"images": kept, "skipped": [each for each in progress["skipped"] if each[0] < kept]}
            write_atomically(recorded, json.dumps(progress))
    write_atomically(listed, marks.tobytes())
    mode = "r+" if path.exists() else "w+"
    rows = np.memmap(path, plan["dtype"], mode, HEADER_BYTES, (len(marks), channels))
    with path.open("r+b") as file, suppress(AttributeError):  # macOS and Windows cannot
        # Reserve all blocks: a full disk is an error now, not a SIGBUS while the map is written.
        os.posix_fallocate(file.fileno(), 0, HEADER_BYTES + rows.nbytes)
    return progress, rows


def _finish(shape: tuple[int, int], dtype: np.dtype, ids: NDArray, out: Path, folder: Path) -> None:
    """Move the complete file to ``out``, replacing an old one, and remove the folder."""
    complete = folder / "embeddings.npy"
    with complete.open("r+b") as file:  # skipped samples leave fewer rows than were reserved
        npy.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + math.prod(shape) * dtype.itemsize)
    np.save(folder / "ids.npy", ids)
    out.unlink(missing_ok=True)  # new ids must not be beside old embeddings
    (folder / "ids.npy").replace(_ids_file(out))
    complete.replace(out)
    shutil.rmtree(folder, ignore_errors=True)


def _embed(model: Backbone, batch: tuple[Tensor, ...], options: EmbeddingOptions, device: str) -> NDArray:
    dtype = choose_precision(options.precision).autocast_dtype
    values, *others = (each.to(device, non_blocking=True) for each in batch)
    with torch.inference_mode(), precision_of(dtype, device):
        embeddings = model.embed(values, options.pooling, options.representation, *others)
        embeddings = normalize(embeddings, dim=1) if options.normalize else embeddings
        return embeddings.to(getattr(torch, options.dtype)).cpu().numpy()


def hash_weights(model: Backbone) -> str:
    """Return a hash of a model's sizes and weights, not of its file, which a run in progress may have replaced."""
    digest = hashlib.sha256(repr((model.encoder.config, model.config)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _load(collection: SampleCollection, indices: Sequence[int]) -> tuple[tuple[Tensor, ...], list[tuple[int, str]]]:
    """Load a batch as :func:`collate` does, and the index and reason of each unreadable sample."""
    samples, skipped = [], []
    for index in indices:
        try:
            samples.append(collection.load(index))
        except UnreadableSampleError as error:
            skipped.append((index, str(error)))
    return collate(samples) if samples else (), skipped
