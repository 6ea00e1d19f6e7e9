"""Align a student with an existing index of any model, or with a teacher, on the samples of a source.

Shapes: N rows of the index, M pairs, B samples of a batch, I inputs of the map, P channels of the index.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn.functional import linear

from d2v_composer.embedding.embed_source import INDEX_KEY, IndexRecord, about_file, ids_file, load_batch
from d2v_composer.evaluation.nearest_neighbors import NUM_COMMON, common_fractions, exact_neighbors, others_of
from d2v_composer.models.alignment import HELD_OUT, MIN_PAIRS, EmbeddingInfo, Moments, side_by_side
from d2v_composer.models.backbone import Backbone
from d2v_composer.sources import listed
from d2v_composer.sources.labeled import evenly_spaced
from d2v_composer.sources.source import Int64Array, Source, map_in_workers
from d2v_composer.system.errors import InputError, RunError, errors_of, reading
from d2v_composer.system.fetch import exists, fetch
from d2v_composer.system.progress import progress_bar

# Held-out samples that are looked up in the index.
MAX_QUERIES = 500
# Pixels alone explain 0.17 of the held-out rows' variance; a map that explains little more finds nothing.
LEAST_R2 = 0.2
BLOCK = 4096  # pairs that are summed up at once
FLOATS = tuple(map(np.dtype, ("float16", "float32", "float64")))  # of an index


class VectorIndex(NamedTuple):
    """Embeddings with their ids."""

    ids: NDArray[np.str_]
    """Id of each row, (N,)."""
    rows: NDArray
    """Embeddings, (N, P), of any float type."""
    made_by: IndexRecord | None
    """``None`` if the index does not say."""


class Aligned(NamedTuple):
    """The measures of a map that :func:`align` fitted, and the samples that it left out."""

    skipped: list[str]
    """Why each unreadable sample was left out."""
    statistics: dict[str, float]
    """Measures of the map; see :attr:`Fit.statistics <d2v_composer.models.alignment.Fit.statistics>`."""
    queries: int
    """Number of held-out samples that were looked up."""
    recall: dict[int, float]
    """k → share of the k rows nearest to a held-out sample's own row that the sample's mapped embedding also finds; the
    own row does not count."""


def read_index(path: str) -> VectorIndex:
    """Read what ``d2v embed`` writes: NAME.npy with NAME.ids.npy, or NAME.parquet with the columns id and embedding.

    Args:
        path: A path, or an address in a store, whose files are kept in the cache.

    Raises:
        InputError: A file is missing, or does not hold one row of finite floats for each id.
    """
    with reading(path):
        if path.endswith(".npy"):
            rows, stored = np.load(fetch(path), mmap_mode="r"), None
            with reading(names := ids_file(path)):
                ids = np.load(fetch(names)).astype(str)
                if ids.shape != (len(rows),):
                    raise ValueError(f"expected one id for each of the {len(rows)} rows, got an array of {ids.shape}")
            if exists(about := about_file(path)):
                stored = fetch(about).read_bytes()
        elif not path.endswith(".parquet"):
            raise ValueError("expected .npy or .parquet")
        else:
            from pyarrow.parquet import read_table  # an extra

            table, about = read_table(fetch(path), columns=["id", "embedding"]).combine_chunks(), path
            stored = (table.schema.metadata or {}).get(INDEX_KEY)
            ids, column = np.array(table["id"].to_pylist(), str), table["embedding"].combine_chunks()
            widths = set(column.value_lengths().to_pylist())
            if len(widths) > 1:
                raise ValueError("its embeddings differ in width")
            rows = column.flatten().to_numpy(zero_copy_only=False).reshape(len(ids), *widths)
        if not rows.size:
            raise ValueError("it is empty")
        if rows.ndim != 2 or rows.dtype not in FLOATS:
            kinds = f"{listed(map(str, FLOATS))} of this machine's byte order"
            raise ValueError(f"expected rows of {kinds}, got {rows.dtype} {rows.shape}")
        for first in range(0, len(rows), 1 << 14):
            largest = np.abs(rows[first : first + (1 << 14)]).max(axis=1).astype(np.float64)
            # In float32, the length of other rows would be infinite, or so short that it is not normalized.
            if not (is_usable := (largest == 0) | ((largest > 1e-9) & (largest < 1e15))).all():
                number = first + int(is_usable.argmin())
                raise ValueError(f"the row of {ids[number]} has numbers that are not finite, or too large or too small")
    with reading(about):
        made_by = None if stored is None else TypeAdapter(IndexRecord).validate_json(stored)
    return VectorIndex(ids, rows, made_by)


def match(source: Source, index: VectorIndex, path: str, maximum: int) -> tuple[list[int], Int64Array, int]:
    """Find samples of a source in an index by their ids: all, or ``maximum`` at even intervals.

    Returns:
        The samples' numbers; the row of each in the index, (M,); and how many rows are left out because they share an
        id with another row.

    Raises:
        InputError: The index has none of the samples; the message names it by ``path``.
    """
    names, places, counts = np.unique(index.ids, return_index=True, return_counts=True)
    rows = dict(zip(names[counts == 1].tolist(), places[counts == 1].tolist(), strict=True))
    numbers = [number for number, name in enumerate(map(str, source.ids)) if name in rows]
    if not numbers:
        there, here = (repr(str(ids[0])) if len(ids) else "none" for ids in (index.ids, source.ids))
        raise InputError(
            f"{path} has no row for a sample of {source.root}: its ids look like {there}, the samples' like {here}"
        )
    numbers = [numbers[place] for place in evenly_spaced(len(numbers), maximum)]
    return numbers, np.array([rows[str(source.ids[number])] for number in numbers]), int(counts[counts > 1].sum())


def align(
    model: Backbone,
    source: Source,
    numbers: Sequence[int],
    target: NDArray | Callable[..., Tensor],
    places: Int64Array | None,
    device: str,
    workers: int,
    of: EmbeddingInfo,
) -> Aligned:
    """Fit a map from a model's embeddings to other embeddings of the same samples, and give it to the model.

    Args:
        model: The model, in eval mode on the device.
        source: The samples.
        numbers: The numbers of the samples to fit to, (M,).
        target: The index, (N, P); or a function that embeds a batch, (B, P), of which all rows make one.
        places: The samples' rows in the index, (M,); ``None`` for a function.
        device: cpu or cuda.
        workers: Number of processes that decode samples.
        of: Description of the other embeddings.

    Raises:
        InputError: Too few samples can be read.
        RunError: R² is below ``LEAST_R2``: the rows seem to be of other samples.
    """
    size, unreadable, inputs, rows = source.modality.batch_size, dict[int, str](), list[Tensor](), list[Tensor]()
    batches = [numbers[first : first + size] for first in range(0, len(numbers), size)]
    loaded = map_in_workers(partial(load_batch, source.decode), batches, workers, device == "cuda")
    for samples, faults in progress_bar(loaded, total=len(batches), desc="aligning", unit="batches"):
        unreadable |= faults
        if samples:
            values = [tensor.to(device) for tensor in samples]
            inputs.append(side_by_side(model.embed_all(*values), model.alignment_inputs).cpu())
            if callable(target):
                rows.append(target(*values).cpu())
    used = [place for place, number in enumerate(numbers) if number not in unreadable]
    places = np.arange(len(used)) if places is None else places[used]
    bank_NP = torch.cat(rows) if callable(target) else torch.from_numpy(np.array(target, np.float32))
    if len(used) < (least := max(MIN_PAIRS, bank_NP.shape[1] // 2)):
        raise InputError(
            f"{source.root}: expected at least {least} pairs (half the width of the embeddings, or {MIN_PAIRS} if "
            f"more), got {len(used)}"
        )
    inputs_MI, targets_MP = torch.cat(inputs), bank_NP[places]
    with errors_of(source.root):
        moments = Moments(zip(inputs_MI.split(BLOCK), targets_MP.split(BLOCK), strict=True))
        fit, trial = moments.fit(), moments.fit(whole=False)
    if fit.statistics["r2"] < LEAST_R2:
        raise RunError(
            f"R² of the map is {fit.statistics['r2']:.3f} on held-out rows; check that the ids belong to these rows, "
            "in the same order"
        )
    held_out = range(HELD_OUT - 1, len(used), HELD_OUT)
    held_out = [held_out[place] for place in evenly_spaced(len(held_out), MAX_QUERIES)]
    ours, theirs = (
        others_of(exact_neighbors(bank_NP, queries, NUM_COMMON + 1).indices, torch.from_numpy(places[held_out]))
        for queries in (linear(inputs_MI[held_out], trial.weight, trial.bias), targets_MP[held_out])
    )
    recall = {k: common_fractions(ours[:, :k], theirs[:, :k]).mean().item() for k in (1, NUM_COMMON)}
    model.align(fit.weight, fit.bias, of.of, space=of.space)
    return Aligned([*unreadable.values()], fit.statistics, len(held_out), recall)
