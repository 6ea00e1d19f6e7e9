"""Search an index exactly, and find its near-duplicates, in bounded memory.

Shapes: N rows of the index, Q queries, K neighbors, D channels.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from d2v_composer.config.reference import load_any
from d2v_composer.data import modality_of
from d2v_composer.embedding.align import VectorIndex
from d2v_composer.embedding.collection import EmbeddingOptions, embed_batch, load_batch
from d2v_composer.evaluation.nearest_neighbors import exact_neighbors
from d2v_composer.sources.open import open_source
from d2v_composer.sources.source import Int64Array, Source
from d2v_composer.system.errors import InputError

# Rows of the index that are compared at once: 64 MiB of cosines.
BLOCK = 1 << 12


class Found(NamedTuple):
    """Rows of an index that a query finds, or that near-duplicates connect."""

    query: str
    """Name of the query; '' for near-duplicates."""
    rows: Int64Array
    """Numbers of the rows, nearest first, (K,); of near-duplicates ascending."""
    cosines: NDArray[np.floating]
    """Cosine of each row with the query, (K,); or with the first row, after the mean of all rows was subtracted."""
    row: int | None = None
    """Number of the query's own row, if it is one of the index."""


def embed_queries(
    index: VectorIndex, path: str, queries: Sequence[str], model: str | None, device: str
) -> tuple[list[Source], list[str], Tensor]:
    """Embed queries with the model of an index, or with one of the same space.

    Args:
        index: The index.
        path: Its path, for errors.
        queries: Sources of the queries; see :func:`~d2v_composer.sources.open.open_source`.
        model: MODEL of ``d2v embed``; ``None`` for the index's own.

    Returns:
        The sources; the names of the queries, (Q,); and their embeddings, (Q, D).

    Raises:
        InputError: The model cannot be loaded, or embeds into another space, or a query is unreadable.
    """
    made_by = index.made_by
    if made_by is None and model is None:
        raise InputError(f"{path} does not say which model made it; name the model with --model")
    try:
        loaded, _ = load_any(**made_by["reference"]) if made_by and model is None else load_any(model or "")
    except InputError as error:
        raise error if model else InputError(f"{error}; {path} was made by it; if it moved, set --model") from error
    fields: dict[str, Any] = made_by["reference"] if made_by and model is None else {}
    name = loaded.choose_embedding(fields.get("pooling"), fields.get("representation"))
    info = loaded.describe(name)
    if made_by and not info.is_in_space_of(made_by["embedding"]):
        raise InputError(
            f"{path} has the embedding {made_by['embedding']} of {made_by['reference']['model']}; "
            f"{model or 'the file that is there now'} embeds into another space: {info}"
        )
    if info.width != index.rows.shape[1]:
        raise InputError(f"{path} has rows of {index.rows.shape[1]} channels, and {model} gives {info.width}")
    loaded.eval().to(device)
    options, sources, names, parts = EmbeddingOptions(name), [], [], []
    for query in queries:
        source = open_source(query, modality_of(loaded.encoder.config))
        sources.append(source)
        for first in range(0, len(source), source.modality.batch_size):
            numbers = range(len(source))[first : first + source.modality.batch_size]
            batch, unreadable = load_batch(source.decode, numbers)
            if unreadable:
                raise InputError(unreadable[0][1])
            names += map(source.name, numbers)
            parts.append(torch.from_numpy(embed_batch(loaded, batch, options, device)))
    return sources, names, torch.cat(parts)


def search(index: VectorIndex, names: Sequence[str], queries: Tensor, k: int) -> list[Found]:
    """Return the k rows nearest to each query, (Q, D), by cosine, or all rows if there are fewer."""
    nearest = exact_neighbors(as_tensor(index.rows), queries, min(k, len(index.ids)))
    found = zip(names, nearest.indices.numpy(), nearest.similarities.numpy(), strict=True)
    return [Found(*each) for each in found]


def search_row(index: VectorIndex, path: str, name: str, k: int) -> Found:
    """Return the k rows nearest to the row with an id, without that row.

    Raises:
        InputError: No row has the id, or several have it.
    """
    rows = np.flatnonzero(index.ids == name)
    if len(rows) != 1:
        like = f"; its ids look like {str(index.ids[0])!r}" if len(index.ids) else ""
        raise InputError(f"--id: expected the id of one row; {len(rows) or 'no'} rows of {path} have {name!r}{like}")
    (found,) = search(index, [name], as_tensor(index.rows[rows]), k + 1)
    others = np.flatnonzero(found.rows != rows[0])[:k]
    return Found(name, found.rows[others], found.cosines[others], int(rows[0]))


def as_tensor(rows: NDArray[Any]) -> Tensor:
    """Return rows as a tensor of the same memory, which nobody writes to; of a mapped file, they are read when used."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(rows)


def near_duplicates(
    rows: NDArray[np.floating], above: float, device: str = "cpu", announce: Callable[[float], None] = lambda _: None
) -> list[Found]:
    """Group rows whose cosine, after the mean of all rows was subtracted, is greater than ``above``.

    Embeddings have much in common, so that their cosines are near 1; without the mean, they differ clearly. A group is
    what pairs connect: two of its rows may be less similar than ``above``. All N² / 2 pairs are compared, by blocks.

    Args:
        rows: The index, (N, D), of any float type; it may be mapped from a file.
        above: Least cosine of a pair, from -1 to 1.
        device: cpu or cuda.
        announce: Called once, with the estimated hours, after the first block was compared.

    Returns:
        The groups, the largest first.
    """
    mean_D = np.zeros(rows.shape[1])
    for first in range(0, len(rows), BLOCK):
        mean_D += rows[first : first + BLOCK].sum(axis=0, dtype=np.float64) / len(rows)

    def unit(first: int) -> Tensor:
        block = torch.from_numpy((rows[first : first + BLOCK] - mean_D).astype(np.float32))
        return normalize(block.to(device), dim=1)

    labels, starts = np.arange(len(rows)), range(0, len(rows), BLOCK)
    begun = time.perf_counter()
    for first in starts:
        unit_BD = unit(first)
        for second in starts[starts.index(first) :]:
            cosines_BB = unit_BD @ (unit_BD if second == first else unit(second)).T
            pairs = (cosines_BB > above).nonzero().cpu().numpy()
            _join(labels, pairs[:, 0] + first, pairs[:, 1] + second)
            if first == second == 0:
                num_blocks = len(starts) * (len(starts) + 1) / 2
                announce((time.perf_counter() - begun) * num_blocks / 3600)
    by_label = np.argsort(labels, kind="stable")
    groups = [group for group in np.split(by_label, np.flatnonzero(np.diff(labels[by_label])) + 1) if len(group) > 1]
    return [_group(rows, mean_D, numbers) for numbers in sorted(groups, key=len, reverse=True)]


def _join(labels: Int64Array, first: Int64Array, second: Int64Array) -> None:
    """Give the rows of connected groups one label, the smallest number of a row among them."""
    while len(first):
        low, high = (choose(labels[first], labels[second]) for choose in (np.minimum, np.maximum))
        apart = low != high
        first, second = first[apart], second[apart]
        np.minimum.at(labels, high[apart], low[apart])
        while (labels[labels] != labels).any():
            labels[:] = labels[labels]


def _group(rows: NDArray[np.floating], mean_D: NDArray[np.float64], numbers: Int64Array) -> Found:
    unit_MD = normalize(torch.from_numpy(np.asarray(rows[numbers]) - mean_D), dim=1)
    return Found("", numbers, (unit_MD @ unit_MD[0]).numpy())
