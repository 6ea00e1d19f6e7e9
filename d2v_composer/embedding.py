"""Embed a collection of images or clips into one file; a killed run loses at most one part of its work.

A run resumes at a whole number of batches, so that a batch does not depend on what was computed before it.
Shapes: N samples, D channels.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
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

from d2v_composer.data.modality import collate
from d2v_composer.data.source import Source, map_in_workers
from d2v_composer.models.backbone import Backbone
from d2v_composer.models.execution import choose_precision
from d2v_composer.models.names import Pooling, PrecisionName, Representation
from d2v_composer.models.precision import precision_of
from d2v_composer.system.errors import InputError, UnreadableSampleError, writing
from d2v_composer.system.files import check_out_file, sole_user, write_atomically
from d2v_composer.system.progress import progress_bar

LOCK_SECONDS = 10.0  # the workers of a killed run exit within a second
PART = 1024  # samples between two records of the progress
HEADER_BYTES = 128  # of a .npy file with an array of two dimensions


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


def embed_source(
    model: Backbone,
    source: Source,
    out: Path,
    options: EmbeddingOptions,
    *,
    device: str = "cpu",
    workers: int = 0,
    skip_unreadable: bool = False,
) -> Embedding:
    """Embed every sample of a source into a file, or resume an interrupted run.

    OUT appears when it is complete, and replaces an old one; NAME.ids.npy appears just before. Until then the rows are
    in a hidden folder next to it. If files of the source changed, came or went, a run resumes before the first of them.

    Args:
        model: The model in eval mode, on the device.
        source: The samples.
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
    num_samples, size, unit = len(source), options.batch_size, source.modality.unit
    plan = {"model": hash_weights(model), "source": source.fingerprint, "device": device, **options._asdict()}
    folder, dtype = _partial_folder(out), np.dtype(options.dtype)
    width = embed_batch(model, (model.encoder.example(1),), options, device).shape[1]
    rows = folder / "embeddings.npy"
    with writing(out), sole_user(folder / ".lock", LOCK_SECONDS) as alone:
        if not alone:
            raise InputError(f"{out}: another process is writing it")
        progress = _start_or_resume(folder, plan, source.marks)
        resumed, skipped, start = progress["images"], progress["skipped"], time.monotonic()
        batches = [range(first, min(first + size, num_samples)) for first in range(resumed, num_samples, size)]
        loaded = map_in_workers(partial(load_batch, source.decode), batches, workers, device == "cuda")
        with (
            rows.open("ab") as file,
            progress_bar(total=num_samples, initial=resumed, desc="embedding", unit=unit) as bar,
        ):
            # Rows follow a header that is written at the end; those after the last record are computed again.
            file.truncate(HEADER_BYTES + (resumed - len(skipped)) * width * dtype.itemsize)
            for batch, (inputs, unreadable) in zip(batches, loaded, strict=True):
                if unreadable and not skip_unreadable:
                    raise InputError(f"{unreadable[0][1]}; --skip-unreadable skips such {unit}")
                if inputs:
                    embeddings = embed_batch(model, inputs, options, device)
                    if not np.isfinite(embeddings).all():
                        named = f"{source.ids[batch.start]}, or one after it in its batch"
                        how = f"--precision {options.precision} and --dtype {options.dtype}"
                        raise InputError(f"{named}: its embedding is not finite with {how}")
                    file.write(embeddings.tobytes())
                skipped += unreadable
                if batch.stop - progress["images"] >= PART or batch is batches[-1]:
                    progress["images"] = batch.stop
                    file.flush()
                    os.fsync(file.fileno())
                    write_atomically(folder / "progress.json", json.dumps(progress))
                bar.update(len(batch))
        seconds = time.monotonic() - start
        ids = np.delete(source.ids, [number for number, _ in skipped])
        _finish((len(ids), width), dtype, ids, out, folder)
    with suppress(OSError):
        folder.rmdir()
    return Embedding(len(ids), width, [reason for _, reason in skipped], resumed, seconds)


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


def _start_or_resume(folder: Path, plan: dict[str, Any], marks: NDArray[np.int64]) -> dict[str, Any]:
    """Return the progress; ``skipped`` lists unreadable samples: number and reason."""
    recorded, listed = folder / "progress.json", folder / "marks"
    progress, size = {"plan": plan, "images": 0, "skipped": []}, plan["batch_size"]
    if recorded.exists() and (folder / "embeddings.npy").exists():
        progress = json.loads(recorded.read_bytes())
        if changed := [key.replace("_", " ") for key in plan if progress["plan"].get(key) != plan[key]]:
            another = f"an interrupted run had a different {', '.join(changed)}"
            raise InputError(f"{folder}: {another}; delete that folder, or choose another OUT")
        before = np.frombuffer(listed.read_bytes(), np.int64)
        both = min(len(before), len(marks))
        num_same = int(np.append(before[:both] != marks[:both], True).argmax())
        if num_same < max(len(before), len(marks)):
            kept = min(num_same, progress["images"]) // size * size  # whole batches
            progress |= {"images": kept, "skipped": [each for each in progress["skipped"] if each[0] < kept]}
            write_atomically(recorded, json.dumps(progress))
    write_atomically(listed, marks.tobytes())
    return progress


def _finish(shape: tuple[int, int], dtype: np.dtype, ids: NDArray, out: Path, folder: Path) -> None:
    """Move the complete file to ``out``, replacing an old one, and remove the folder."""
    complete = folder / "embeddings.npy"
    with complete.open("r+b") as file:
        npy.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    np.save(folder / "ids.npy", ids)
    out.unlink(missing_ok=True)  # new ids must not be beside old embeddings
    (folder / "ids.npy").replace(_ids_file(out))
    complete.replace(out)
    shutil.rmtree(folder, ignore_errors=True)


def embed_batch(model: Backbone, batch: tuple[Tensor, ...], options: EmbeddingOptions, device: str) -> NDArray:
    """Embed a batch of :func:`load_batch`: (N, D)."""
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


def load_batch(
    decode: Callable[[int], Tensor], numbers: Sequence[int]
) -> tuple[tuple[Tensor, ...], list[tuple[int, str]]]:
    """Load a batch as :func:`collate` does, and the number and reason of each unreadable sample.

    Args:
        decode: Returns a sample by number, as :meth:`Source.decode`.
        numbers: Of the samples.
    """
    samples, skipped = [], []
    for number in numbers:
        try:
            samples.append(decode(number))
        except UnreadableSampleError as error:
            skipped.append((number, str(error)))
    return collate(samples) if samples else (), skipped
