"""Search an index exactly, and find its near-duplicates.

Shapes: N rows of the index, Q queries, K neighbors, D channels.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import normalize

from d2v_composer.config.reference import load_any
from d2v_composer.data import modality_of
from d2v_composer.embedding.embed_source import EmbeddingOptions, IndexRecord, embed_batches
from d2v_composer.embedding.index import VectorIndex
from d2v_composer.evaluation.nearest_neighbors import exact_neighbors
from d2v_composer.models.backbone import Backbone, hash_weights
from d2v_composer.models.names import EMBEDDING
from d2v_composer.models.precision import precision_of
from d2v_composer.sources.open import open_source
from d2v_composer.sources.source import Int64Array, Source
from d2v_composer.system.errors import InputError
from d2v_composer.system.progress import progress_bar

# Rows of the index that are compared at once: 64 MiB of cosines.
BLOCK = 1 << 12


class Found(NamedTuple):
    """Rows of an index: the nearest to a query, or a group of near-duplicates."""

    query: str
    """Name of the query; '' for near-duplicates."""
    rows: Int64Array
    """Indices of the rows, (K,): nearest first, or ascending in a group of near-duplicates."""
    cosines: NDArray[np.floating]
    """Cosine of each row with the query, (K,); in a group of near-duplicates, with the group's first row, after the
    mean of all rows was subtracted."""
    row: int | None = None
    """Index of the query's row, if the query is a row of the index."""


def embed_queries(
    index: VectorIndex, path: str, queries: Sequence[str], model: str | None, device: str
) -> tuple[list[Source], list[str], Tensor]:
    """Embed queries with the model that made an index, or with ``model``.

    Returns:
        The sources, the names of the queries, (Q,), and the embeddings of the queries, (Q, D).
    """
    made_by, reference = index.made_by, dict[str, Any]()
    if made_by is not None:
        reference = dict(made_by["reference"])
    elif model is None:
        raise InputError(f"{path} does not say which model made it; name the model with --model")
    raw = {name: reference.pop(name, None) for name in ("pooling", "representation")}
    try:
        loaded, _ = load_any(model) if model is not None else load_any(**reference)
    except InputError as error:
        if model is not None:
            raise
        raise InputError(
            f"{error}; {path} was made with this model; if the model has moved, give its path with --model"
        ) from error
    name = EMBEDDING
    if made_by is not None and (name := _matching_embedding(loaded, made_by, raw)) is None:
        raise InputError(
            f"{path} has embeddings of {made_by['reference']['model']} ({made_by['embedding']}); "
            f"{model or 'the model has changed, and'} embeds into another space ({loaded.embedding})"
        )
    if (width := loaded.describe(name).width) != index.rows.shape[1]:
        raise InputError(
            f"{path} has rows of {index.rows.shape[1]} channels, but the model's embeddings have {width}; "
            "name another model with --model"
        )
    loaded.eval().to(device)
    options, sources, names, parts = EmbeddingOptions(name), list[Source](), list[str](), list[Tensor]()
    for query in queries:
        sources.append(source := open_source(query, modality_of(loaded.encoder.config)))
        size = source.modality.batch_size
        batches = [range(first, min(first + size, len(source))) for first in range(0, len(source), size)]
        for block, unreadable in embed_batches(loaded, source, batches, options, device, workers=0):
            if unreadable:
                raise InputError(unreadable[0][1])
            parts.append(torch.from_numpy(block))
        names += map(source.name, range(len(source)))
    return sources, names, torch.cat(parts)


def _matching_embedding(model: Backbone, made_by: IndexRecord, raw: Mapping[str, Any]) -> str | None:
    """Return the name of the model's embedding that is in the space of an index; ``None`` if no embedding is."""
    has_its_weights = hash_weights(model) == made_by["model"]
    for name in (EMBEDDING, f"{raw['representation'] or 'output'}_{raw['pooling'] or model.default_pooling}"):
        if name == EMBEDDING or name in model.raw_names:
            info, of_index = model.describe(name), made_by["embedding"]
            # An index of unknown space is in the space of the model that made it.
            if info.is_in_space_of(of_index) or (has_its_weights and info == of_index):
                return name
    return None


def search(index: VectorIndex, names: Sequence[str], queries: Tensor, k: int) -> list[Found]:
    """Return, for each of ``queries``, (Q, D), the k rows with the largest cosines, or all rows if there are fewer."""
    nearest = exact_neighbors(as_tensor(index.rows), queries, min(k, len(index.ids)))
    found = zip(names, nearest.indices.numpy(), nearest.similarities.numpy(), strict=True)
    return [Found(*each) for each in found]


def search_row(index: VectorIndex, path: str, name: str, k: int) -> Found:
    """Return the k rows nearest to the row whose id is ``name``, without that row."""
    rows = np.flatnonzero(index.ids == name)
    if len(rows) != 1:
        raise InputError(
            f"--id: expected the id of one row; {len(rows) or 'no'} rows of {path} have the id {name!r}; "
            f"the first id is {str(index.ids[0])!r}"
        )
    (found,) = search(index, [name], torch.from_numpy(index.rows[rows]), k + 1)
    others = np.flatnonzero(found.rows != rows[0])[:k]
    return Found(name, found.rows[others], found.cosines[others], int(rows[0]))


def as_tensor(rows: NDArray[Any]) -> Tensor:
    """Return rows as a tensor that shares their memory, and that must not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(rows)


def near_duplicates(rows: NDArray[np.floating], above: float, device: str = "cpu") -> list[Found]:
    """Group rows whose cosine, after the mean of all rows was subtracted, is greater than ``above``.

    Pairs connect rows into groups, so two rows of a group may be less similar than ``above``.

    Args:
        rows: Rows of the index, (N, D), of any float type; the array may be mapped from a file.
        above: The cosine that a pair must exceed, from -1 to 1.
        device: cpu or cuda.

    Returns:
        The groups, the largest first.
    """
    # A model's embeddings have much in common: without the mean, cosines differ clearly.
    mean_D = np.zeros(rows.shape[1])
    for first in range(0, len(rows), BLOCK):
        mean_D += rows[first : first + BLOCK].sum(axis=0, dtype=np.float64) / len(rows)
    labels, starts = np.arange(len(rows)), range(0, len(rows), BLOCK)
    total = len(starts) * (len(starts) + 1) // 2
    with precision_of(None, device), progress_bar(total=total, desc="comparing", unit="blocks") as bar:
        for first in starts:
            unit_BD = _centered(rows[first : first + BLOCK], mean_D).float().to(device)
            for second in range(first, len(rows), BLOCK):
                others_BD = _centered(rows[second : second + BLOCK], mean_D).float().to(device)
                similar = (unit_BD @ others_BD.T > above).nonzero().cpu().numpy()
                _join(labels, similar[:, 0] + first, similar[:, 1] + second)
                bar.update()
    by_label = np.argsort(labels, kind="stable")
    groups = [group for group in np.split(by_label, np.flatnonzero(np.diff(labels[by_label])) + 1) if len(group) > 1]
    found = list[Found]()
    for group in sorted(groups, key=len, reverse=True):
        blocks = [group[first : first + BLOCK] for first in range(0, len(group), BLOCK)]
        first_D = _centered(rows[group[:1]], mean_D)[0]
        found.append(Found("", group, np.concatenate([_centered(rows[block], mean_D) @ first_D for block in blocks])))
    return found


def _centered(rows: NDArray[np.floating], mean_D: NDArray[np.float64]) -> Tensor:
    """Subtract the mean from rows, (B, D), and scale the rows to length 1, in float64."""
    rest_BD = torch.from_numpy(rows - mean_D)
    is_mean_B = vector_norm(rest_BD, dim=1) <= 1e-6 * np.linalg.norm(mean_D)
    return normalize(torch.where(is_mean_B[:, None], 1.0, rest_BD), dim=1)


def _join(labels: Int64Array, first: Int64Array, second: Int64Array) -> None:
    """For every i, join the groups of rows ``first[i]`` and ``second[i]``: all rows of both get the smallest label."""
    while len(first):
        low, high = (choose(labels[first], labels[second]) for choose in (np.minimum, np.maximum))
        apart = low != high
        first, second = first[apart], second[apart]
        np.minimum.at(labels, high[apart], low[apart])
        while (labels[labels] != labels).any():
            labels[:] = labels[labels]
