"""Align a student with an existing index of any model, or with a teacher, on the samples of a source.

Shapes: N rows of the index, M pairs, B samples of a batch, I input channels of the alignment, P channels of the
target.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from d2v_composer.embedding.embed_source import load_batch
from d2v_composer.embedding.index import VectorIndex
from d2v_composer.evaluation.nearest_neighbors import NUM_COMMON, common_fractions, exact_neighbors, others_of
from d2v_composer.models.alignment import HELD_OUT, MIN_PAIRS, EmbeddingInfo, Moments, side_by_side
from d2v_composer.models.backbone import Backbone
from d2v_composer.models.names import EMBEDDING
from d2v_composer.sources.labeled import evenly_spaced
from d2v_composer.sources.source import Int64Array, Source, map_in_workers
from d2v_composer.system.errors import InputError, RunError, errors_of
from d2v_composer.system.progress import progress_bar

# Held-out samples that are looked up in the index.
MAX_QUERIES = 500
# Pixels alone explain 0.17 of the held-out rows' variance; an alignment that explains little more finds nothing.
LEAST_R2 = 0.2
BLOCK = 4096  # pairs that are summed up at once


class Aligned(NamedTuple):
    """Result of :func:`align`."""

    skipped: list[str]
    """For each sample that was left out, why it is unreadable."""
    statistics: dict[str, float]
    """Measures of the alignment; see :attr:`Fit.statistics <d2v_composer.models.alignment.Fit.statistics>`."""
    queries: int
    """Number of held-out samples on which ``recall`` is measured."""
    recall: dict[int, float]
    """k → share of the k rows nearest to a held-out sample's row that are also among the k rows nearest to the sample's
    aligned embedding, as a mean over the held-out samples. The sample's own row does not count."""


class Pairs(NamedTuple):
    """Samples of a source, and the embeddings to which an alignment is fitted."""

    numbers: Sequence[int]
    """Indices of the samples in the source, (M,)."""
    target: NDArray | Callable[..., Tensor]
    """Rows of the index, (N, P), or a function that maps the inputs of a batch to embeddings, (B, P)."""
    places: Int64Array | None
    """Index of each sample's row in ``target``, (M,); ``None`` if ``target`` is a function."""
    of: EmbeddingInfo
    """Description of the embeddings in ``target``."""


def pairs_of_index(source: Source, index: VectorIndex, path: str, maximum: int) -> tuple[Pairs, int]:
    """Pair at most ``maximum`` samples, evenly spaced, with the rows of an index that have the same ids.

    Returns:
        The pairs, and the number of rows left out because they share an id with another row.
    """
    names, places, counts = np.unique(index.ids, return_index=True, return_counts=True)
    rows = dict(zip(names[counts == 1].tolist(), places[counts == 1].tolist(), strict=True))
    numbers = [number for number, name in enumerate(map(str, source.ids)) if name in rows]
    num_repeated = int(counts[counts > 1].sum())
    if not numbers:
        there, here = (repr(str(ids[0])) if len(ids) else "none" for ids in (index.ids, source.ids))
        repeated = f"; left out {num_repeated:,} rows with repeated ids" if num_repeated else ""
        raise InputError(
            f"{path} has no row for any sample of {source.root}: the first id is {there} in the index, and {here} "
            f"in the source{repeated}"
        )
    numbers = [numbers[place] for place in evenly_spaced(len(numbers), maximum)]
    found = np.array([rows[str(source.ids[number])] for number in numbers])
    unknown = EmbeddingInfo("unknown embedding", "raw", index.rows.shape[1], "")
    of = unknown if index.made_by is None else index.made_by["embedding"]
    return Pairs(numbers, index.rows, found, of), num_repeated


def pairs_of_model(source: Source, model: Backbone, maximum: int) -> Pairs:
    """Pair at most ``maximum`` samples, evenly spaced, with a model's embeddings of the samples."""
    numbers = evenly_spaced(len(source), maximum)
    return Pairs(numbers, lambda *inputs: model.embed_all(*inputs)[EMBEDDING], None, model.embedding)


def align(model: Backbone, source: Source, pairs: Pairs, device: str, workers: int) -> Aligned:
    """Give a model an alignment that is fitted to the embeddings of ``pairs``."""
    numbers, target, places, of = pairs
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
            f"{source.root}: expected at least {least} readable samples, each with an embedding to align to, "
            f"got {len(used)}"
        )
    inputs_MI, targets_MP = torch.cat(inputs), bank_NP[places]
    with errors_of(source.root):
        moments = Moments(zip(inputs_MI.split(BLOCK), targets_MP.split(BLOCK), strict=True))
        fit, trial = moments.fit(), moments.fit(whole=False)
    if fit.statistics["r2"] < LEAST_R2:
        raise RunError(
            f"R² of the alignment on held-out samples must be at least {LEAST_R2}, got {fit.statistics['r2']:.3f}: "
            "train the student longer; if you align with an index, check that its ids are those of the samples"
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
