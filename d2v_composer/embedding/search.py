"""Search an index exactly, and find its near-duplicates, in bounded memory.

Shapes: N rows of the index, Q queries, K neighbors, D channels.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from d2v_composer.sources.source import Int64Array

# Rows of the index that are compared at once: 64 MiB of cosines.
BLOCK = 1 << 12


class DuplicateGroup(NamedTuple):
    """Rows of an index that near-duplicates connect."""

    rows: Int64Array
    """Numbers of the rows, ascending, (M,)."""
    cosines: NDArray[np.float32]
    """Cosine of each row with the first one, (M,), after the mean of all rows was subtracted."""


def near_duplicates(
    rows: NDArray[np.floating], above: float, device: str = "cpu", announce: Callable[[float], None] = lambda hours: None
) -> list[DuplicateGroup]:
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
    return [_describe(rows, mean_D, group) for group in sorted(groups, key=len, reverse=True)]


def _join(labels: Int64Array, first: Int64Array, second: Int64Array) -> None:
    """Give the rows of connected groups one label, the smallest number of a row among them."""
    while len(first):
        low, high = (choose(labels[first], labels[second]) for choose in (np.minimum, np.maximum))
        apart = low != high
        first, second = first[apart], second[apart]
        np.minimum.at(labels, high[apart], low[apart])
        while (labels[labels] != labels).any():
            labels[:] = labels[labels]


def _describe(rows: NDArray[np.floating], mean_D: NDArray[np.float64], group: Int64Array) -> DuplicateGroup:
    unit_MD = normalize(torch.from_numpy(np.asarray(rows[group]) - mean_D), dim=1)
    return DuplicateGroup(group, (unit_MD @ unit_MD[0]).float().numpy())
