"""Embed the samples of a source, in one process or several, write the embeddings, and merge the files of parts.

Shapes: N samples, B samples of a batch, D channels.
"""

import io
import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm
from typing_extensions import TypedDict

from d2v_composer.conversion.parts import TABLE_SUFFIXES, Parts, fetch_if_remote, plan_of
from d2v_composer.data.modality import collate
from d2v_composer.models.alignment import EmbeddingInfo
from d2v_composer.models.backbone import Backbone, hash_weights
from d2v_composer.models.names import EMBEDDING, PrecisionName
from d2v_composer.models.precision import choose_precision, precision_of
from d2v_composer.models.provenance import Json, Record
from d2v_composer.sources.source import Source, hash_of, map_in_threads, map_in_workers
from d2v_composer.system.errors import InputError, RunError, UnreadableSampleError, reading, writing
from d2v_composer.system.fetch import cache_folder, check_outputs, exists, is_remote, put
from d2v_composer.system.files import acquire, read_json, sole_user, write_atomically
from d2v_composer.system.processes import ALL, Part, global_rank, num_ranks
from d2v_composer.system.progress import progress_bar

LOCK_SECONDS = 10.0  # the workers of a killed run exit within a second
CHUNK = 1024  # samples that a killed process loses at most
POLL_SECONDS = 0.2
RANK_SECONDS = 300.0  # by then a rank has begun, or never will
INDEX_KEY = b"d2v_composer"  # of a Parquet file's metadata
PLAN = "plan.json"  # the run's settings, beside the chunks
MOVING = "moving"  # beside the chunks from when OUT was last checked: its files are then replaced


class EmbeddingOptions(NamedTuple):
    """Settings for embedding samples."""

    embedding: str = EMBEDDING
    """Name of one of the model's embeddings."""
    precision: PrecisionName = "fp32"
    normalize: bool = False
    """Scale embeddings to length 1."""
    dtype: str = "float32"
    """Dtype of the embeddings: float32 or float16."""
    batch_size: int = 256
    """Number of samples in a batch."""


class IndexRecord(TypedDict):
    """Model and samples of an index, stored in NAME.parquet's metadata or in NAME.model.json beside NAME.npy."""

    reference: Record
    """The fields of :class:`~d2v_composer.config.reference.ModelReference` that load the model again."""
    model: str
    """Hash of the model's sizes and weights."""
    embedding: EmbeddingInfo
    source: str
    """SOURCE of ``d2v embed``; a local path is absolute."""
    column: str | None
    """``--column`` of ``d2v embed``."""
    modality: Literal["image", "audio"]


class Embedded(NamedTuple):
    """Result of embedding a source, or of merging parts."""

    images: int
    channels: int
    skipped: list[str]
    """For each unreadable sample, why it was skipped."""
    resumed: int
    """Number of samples that earlier, interrupted runs had embedded."""
    seconds: float
    """Seconds that this run took to embed the remaining samples."""


class _Chunk(NamedTuple):
    """Consecutive batches, and the file of their embeddings."""

    batches: Sequence[range]
    path: Path
    rank: int
    """Rank of the process that embeds the batches."""

    @property
    def samples(self) -> range:
        return range(self.batches[0].start, self.batches[-1].stop)

    def read(self, name: str) -> NDArray:
        with np.load(self.path) as arrays:
            return arrays[name]

    def read_block(self, source: Source) -> tuple[NDArray, NDArray]:
        ids = np.array([source.ids[number] for number in self.samples])
        return np.delete(ids, self.read("numbers") - self.samples.start), self.read("rows")

    def write(self, rows: Sequence[NDArray], unreadable: Sequence[tuple[int, str]]) -> None:
        numbers = np.array([number for number, _ in unreadable], int)
        reasons = np.array([reason for _, reason in unreadable], str)
        archive = io.BytesIO()  # on a full disk, numpy's writer hides the error behind another
        np.savez(archive, rows=np.concatenate(rows), numbers=numbers, reasons=reasons)
        write_atomically(self.path, archive.getvalue())


def embed_source(
    model: Backbone,
    source: Source,
    out: str | Path,
    options: EmbeddingOptions,
    *,
    device: str,
    workers: int,
    skip_unreadable: bool = False,
    overwrite: bool = False,
    part: Mapping[str, Json] | None = None,
    made_from: Mapping[str, Json],
) -> Embedded:
    """Embed every sample of a source, or of its part, into a file, or resume an interrupted run.

    All ranks must call this function; rank 0 writes ``out`` when all samples are embedded.

    Args:
        model: The model in eval mode, on the device.
        source: The samples.
        out: Path or address of NAME.npy, (N, D), whose ids, (N,), are in NAME.ids.npy; or of NAME.parquet.
        options: The settings.
        device: cpu or cuda.
        workers: Number of processes that decode samples.
        skip_unreadable: Skip and list unreadable samples instead of stopping.
        overwrite: Replace ``out`` if it exists.
        part: Record of the source's part, from :func:`record_of`; default: the source is whole.
        made_from: The fields ``reference``, ``source`` and ``column`` of :class:`IndexRecord`.
    """
    out, rank = str(out), global_rank()
    place = source.root if is_remote(source.root) else Path(source.root).resolve()
    plan = part or record_of(model, source, ALL, options, device) | {"source": hash_of(place)}  # some files may change
    info = model.describe(options.embedding)
    folder, unit = _partial_folder(out), source.modality.unit
    chunks = _cut(source, plan, folder)
    with _sole_writer(out, folder, f".lock{rank or ''}"):
        if rank == 0:
            check_out(out, overwrite=overwrite, part=part)
            _check_plan(folder, plan)
        start, left = time.monotonic(), [chunk for chunk in chunks if not chunk.path.exists()]
        total, to_do = (sum(len(chunk.samples) for chunk in some) for some in (chunks, left))
        theirs, resumed = deque(chunk for chunk in left if chunk.rank != rank), total - to_do
        with progress_bar(total=total, initial=resumed, desc="embedding", unit=unit) as bar:
            batches = [(chunk, batch) for chunk in left if chunk.rank == rank for batch in chunk.batches]
            embedded = embed_batches(model, source, [batch for _, batch in batches], options, device, workers)
            rows, skipped = list[NDArray](), list[tuple[int, str]]()
            for (chunk, batch), (block, unreadable) in zip(batches, embedded, strict=True):
                skipped += unreadable
                _check_skipped([reason for _, reason in skipped], skip_unreadable, unit)
                rows.append(block)
                bar.update(len(batch))
                if batch is chunk.batches[-1]:
                    write_atomically(folder / PLAN, json.dumps(plan))
                    chunk.write(rows, skipped)
                    rows, skipped = [], []
                    _count(theirs, bar)
            if rank == 0:
                _wait(theirs, bar, folder)
        seconds = time.monotonic() - start
        if rank > 0:
            return Embedded(total, info.width, [], resumed, seconds)
        reasons = [reason for chunk in chunks for reason in chunk.read("reasons").tolist()]
        _check_skipped(reasons, skip_unreadable, unit)  # an interrupted run may have skipped them
        embedding = Embedded(total - len(reasons), info.width, reasons, resumed, seconds)
        blocks = (chunk.read_block(source) for chunk in chunks)
        about = {"model": plan["model"], "embedding": info._asdict(), "modality": source.modality.name, **made_from}
        _write_table(out, blocks, embedding, np.dtype(options.dtype), overwrite, about, part)
    return embedding


def embed_batches(
    model: Backbone, source: Source, batches: Sequence[range], options: EmbeddingOptions, device: str, workers: int
) -> Iterator[tuple[NDArray, list[tuple[int, str]]]]:
    """Yield, for each batch, the readable samples' embeddings, (B, D), and each unreadable sample's index and error."""
    width = model.describe(options.embedding).width
    loaded = map_in_workers(partial(load_batch, source.decode), batches, workers, device == "cuda")
    for batch, (inputs, unreadable) in zip(batches, loaded, strict=True):
        block = embed_batch(model, inputs, options, device) if inputs else np.zeros((0, width), options.dtype)
        if not np.isfinite(block).all():
            raise InputError(
                f"the embedding of sample {source.ids[batch.start]}, or of a later sample in the batch, is not finite "
                f"with precision {options.precision} and dtype {options.dtype}"
            )
        yield block, unreadable


def record_of(model: Backbone, source: Source, part: Part, options: EmbeddingOptions, device: str) -> Record:
    """Return a part's record: its index; and the source, settings and number of parts, which all parts share."""
    settings = options._asdict() | {"embedding": str(model.describe(options.embedding))}
    return plan_of(source, part, model=hash_weights(model), device=device, **settings)


@contextmanager
def _sole_writer(out: str, folder: Path, lock: str = ".lock") -> Iterator[None]:
    """Hold a lock in the folder of chunks while the ``with`` block runs."""
    with writing(folder), sole_user(folder / lock, LOCK_SECONDS) as alone:
        if not alone:
            raise InputError(
                f"{out}: another process is writing this file; wait until that process ends, or choose another OUT"
            )
        yield
    with suppress(OSError):
        folder.rmdir()


def check_ids(ids: Iterable[object]) -> None:
    """Check that Parquet can store the ids of samples."""
    for name in map(str, ids):
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{name!r} is not UTF-8, which Parquet needs; rename the file, or choose an OUT that ends in .npy"
            ) from error


def _cut(source: Source, plan: Mapping[str, Json], folder: Path) -> list[_Chunk]:
    """Cut a source, or its part, into chunks; the name of a chunk's file is a hash of what the embeddings depend on."""
    # A killed run loses at most one chunk of each process, and any number of processes writes the same bytes.
    size, chunks = plan["batch_size"], list[_Chunk]()
    batches = source.part.of([range(first, min(first + size, len(source))) for first in range(0, len(source), size)])
    for first in range(0, len(batches), per_chunk := max(1, CHUNK // size)):
        some = batches[first : first + per_chunk]
        fingerprints = source.fingerprints[some[0].start : some[-1].stop]
        name = f"{hash_of(plan, fingerprints.tobytes())[:32]}.npz"
        chunks.append(_Chunk(some, folder / name, len(chunks) % num_ranks()))
    return chunks


def _count(theirs: deque[_Chunk], bar: tqdm) -> None:
    """Advance the bar by the samples that the other ranks have embedded since the last call."""
    while theirs and theirs[0].path.exists():
        bar.update(len(theirs.popleft().samples))


def _wait(theirs: deque[_Chunk], bar: tqdm, folder: Path) -> None:
    """Wait until the other ranks have embedded their samples."""
    deadline = time.monotonic() + RANK_SECONDS
    while theirs:
        time.sleep(POLL_SECONDS)
        _count(theirs, bar)
        if time.monotonic() > deadline:
            if all(acquire(folder / f".lock{other}") for other in range(1, num_ranks())):
                raise RunError(
                    f"{folder}: the other ranks ended without embedding {bar.total - bar.n} samples; all ranks need "
                    "access to SOURCE and to this folder"
                )
            deadline += RANK_SECONDS


def _check_skipped(reasons: Sequence[str], skip_unreadable: bool, unit: str) -> None:
    if reasons and not skip_unreadable:
        raise InputError(f"{reasons[0]}; --skip-unreadable skips such {unit}")


def _check_plan(folder: Path, plan: Mapping[str, Json]) -> None:
    recorded = folder / PLAN
    before = read_json(recorded, Record) if recorded.exists() else plan
    if changed := [key.replace("_", " ") for key in plan if before.get(key) != plan[key]]:
        raise InputError(
            f"{folder}: an interrupted run had other settings ({', '.join(changed)}); delete that folder, or choose "
            "another OUT"
        )


def merge_embeddings(out: str, *, overwrite: bool) -> Embedded:
    """Merge all parts of ``out``, write ``out``, and keep the parts."""
    check_out(out, overwrite=overwrite)
    parts, folder = Parts(out), _partial_folder(out)
    records = parts.read_all()
    first = next(iter(records.values()))
    with _sole_writer(out, folder):
        skipped = [reason for record in records.values() for reason in record["skipped"]]
        embedding = Embedded(sum(record["images"] for record in records.values()), first["channels"], skipped, 0, 0.0)
        read = (_read_part(parts.path(part), record, folder) for part, record in records.items())
        dtype = np.dtype(first["part"]["dtype"])
        _write_table(out, chain.from_iterable(read), embedding, dtype, overwrite, first["about"])
    return embedding


def _read_part(address: str, record: Mapping[str, Json], folder: Path) -> Iterator[tuple[NDArray, NDArray]]:
    """Yield the ids, (B,), and embeddings, (B, D), of a part, block by block."""
    is_array = address.endswith(".npy")
    with reading(address):
        files = [fetch_if_remote(path, folder) for path in ([ids_file(address)] if is_array else []) + [address]]
        if [*map(_digest, files)] != record["digests"]:
            raise ValueError("it is not the file that its record describes; remove this part")
        if is_array:
            ids, rows = (np.load(file, mmap_mode="r") for file in files)
            for first in range(0, len(ids), CHUNK):
                yield ids[first : first + CHUNK], rows[first : first + CHUNK]
            return
        from pyarrow.parquet import ParquetFile

        with ParquetFile(*files) as file:
            for batch in file.iter_batches(CHUNK):
                embeddings: Any = batch["embedding"]
                yield np.array(batch["id"].to_pylist()), embeddings.flatten().to_numpy().reshape(len(batch), -1)


def _digest(path: Path) -> str:
    return xxhash.xxh3_128_hexdigest(np.memmap(path, mode="r").data)


def _write_table(
    out: str,
    blocks: Iterable[tuple[NDArray, NDArray]],
    embedding: Embedded,
    dtype: np.dtype,
    overwrite: bool,
    about: Mapping[str, Json],
    part: Mapping[str, Json] | None = None,
) -> None:
    """Write ids and embeddings, move them to ``out``, and remove the folder of chunks."""
    complete, files = (folder := _partial_folder(out)) / "embeddings", {}
    if out.endswith(".npy"):
        shape, all_ids = (embedding.images, embedding.channels), list[NDArray]()

        def rows() -> Iterator[NDArray]:
            for ids, embeddings in blocks:
                all_ids.append(ids)
                yield embeddings

        _write_array(complete, rows(), shape, dtype)
        # Each id takes the room of the longest, but only on the disk.
        _write_array(folder / "ids.npy", all_ids, shape[:1], np.result_type(*all_ids or [np.array([], str)]))
        files[ids_file(out)] = folder / "ids.npy"
        if part is None:
            write_atomically(folder / "model.json", json.dumps(about, indent=1))
            files[about_file(out)] = folder / "model.json"
    else:
        _write_parquet(complete, blocks, embedding.channels, dtype, about)
    if part is not None:  # first, as it tells whose the others are
        digests = [*map(_digest, [*files.values(), complete])]
        record = {"part": part, "digests": digests, "about": about} | embedding._asdict()
        write_atomically(folder / "record.json", json.dumps(record))
        files = {_record_file(out): folder / "record.json"} | files
    check_out(out, overwrite=overwrite, part=part)
    (folder / MOVING).touch()
    if not is_remote(out):
        Path(out).unlink(missing_ok=True)  # new ids must not be beside old embeddings
    elif part is None and exists(out):  # not every store's client can delete
        (empty := folder / "empty").touch()
        put(empty, out)
    for address, path in (files | {out: complete}).items():
        put(path, address)
    shutil.rmtree(folder, ignore_errors=True)


def _write_array(path: Path, blocks: Iterable[NDArray], shape: tuple[int, ...], dtype: np.dtype) -> None:
    with path.open("wb") as file:
        npy.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})
        for block in blocks:
            file.write(block.astype(dtype, copy=False).tobytes())


def _write_parquet(
    path: Path, blocks: Iterable[tuple[NDArray, NDArray]], width: int, dtype: np.dtype, about: Mapping[str, Json]
) -> None:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    blocks = iter(blocks)
    first = next(blocks, (np.array([], str), np.zeros((0, width), dtype)))
    id_type = pa.string() if first[0].dtype.kind == "U" else pa.int64()
    fields = [("id", id_type), ("embedding", pa.list_(pa.from_numpy_dtype(dtype), width))]
    schema = pa.schema(fields, {INDEX_KEY: json.dumps(about)})
    with ParquetWriter(path, schema) as writer:
        for ids, rows in chain([first], blocks):
            embeddings = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), width)
            writer.write_batch(pa.record_batch([pa.array(ids.tolist(), id_type), embeddings], schema))


def check_out(out: str, *, overwrite: bool, part: Mapping[str, Json] | None = None) -> None:
    """Check that embeddings can be written to ``out``."""
    if not out.endswith(TABLE_SUFFIXES):
        raise InputError(f"{out} must end in {' or '.join(TABLE_SUFFIXES)}")
    outputs = [out]
    if out.endswith(".npy"):
        outputs += [ids_file(out), about_file(out)]
    else:
        import pyarrow  # noqa: F401  (if it is missing, this error says what to install)
    is_ours = (_partial_folder(out) / MOVING).exists()
    if part is not None:
        outputs.append(record := _record_file(out))
        with reading(record):
            is_ours = is_ours or (exists(record) and "part" in Parts.load(record))
    check_outputs(*outputs, overwrite=overwrite or is_ours)


def _partial_folder(out: str) -> Path:
    if is_remote(out):
        return cache_folder() / "embeddings" / hash_of(out)[:16]
    return Path(out).with_name(f".{Path(out).name}.partial")


def ids_file(out: str) -> str:
    """Return the path of the ids of NAME.npy."""
    return f"{out.removesuffix('.npy')}.ids.npy"


def about_file(out: str) -> str:
    """Return the path of the :class:`IndexRecord` of NAME.npy."""
    return f"{out.removesuffix('.npy')}.model.json"


def _record_file(out: str) -> str:
    return f"{out.rpartition('.')[0]}.json"


def embed_batch(model: Backbone, batch: tuple[Tensor, ...], options: EmbeddingOptions, device: str) -> NDArray:
    """Return the embeddings, (B, D), of a batch from :func:`load_batch`."""
    dtype = choose_precision(options.precision).autocast_dtype
    values, *lengths = (tensor.to(device, non_blocking=True) for tensor in batch)
    with torch.inference_mode(), precision_of(dtype, device):
        embeddings = model.embed_all(values, *lengths)[options.embedding]
        embeddings = normalize(embeddings, dim=1) if options.normalize else embeddings
        return embeddings.to(getattr(torch, options.dtype)).cpu().numpy()


def load_batch(
    decode: Callable[[int], Tensor], numbers: Sequence[int]
) -> tuple[tuple[Tensor, ...], list[tuple[int, str]]]:
    """Load a batch for :func:`embed_batch`.

    Returns:
        The batch of readable samples, empty if there are none; and the index and error of each unreadable sample.
    """

    def attempt(number: int) -> Tensor | str:
        try:
            return decode(number)
        except UnreadableSampleError as error:
            return str(error)

    decoded = [*zip(numbers, map_in_threads(attempt, numbers), strict=True)]
    samples = [sample for _, sample in decoded if isinstance(sample, Tensor)]
    return collate(samples) if samples else (), [(number, text) for number, text in decoded if isinstance(text, str)]
