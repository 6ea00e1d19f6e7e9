"""The results of an evaluation, as a run's checkpoints keep them.

Shapes: Q queries, K neighbors.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor


class Measure(NamedTuple):
    """A measure that scores each query of a data set: a column of tables."""

    bank: str
    """The split that is searched, or to which a classifier is fitted; ``classes`` for text embeddings of the classes;
    '' for the test images among themselves."""
    name: str
    k: int | None
    """The number of neighbors; ``None`` for a classifier."""
    key: str
    """The measure's part of a log key."""
    heading: str
    """The heading of the measure's column in tables."""


class Result(NamedTuple):
    """One measure of one row's embedding on one data set."""

    row: str
    """The row's title."""
    dataset: str
    measure: Measure
    embedding: str
    """Name of the embedding; '' if it is the only one and has no name."""
    is_primary: bool
    """True for the row's primary embedding, and for the only embedding that ``zero_shot`` measures."""
    hits: Tensor
    """For each query, on the host: (Q,) bool, or the share of common neighbors, (Q,) float64."""
    batch: int = 0
    """Number of training batches after which a run measured the row."""
    nearest: Tensor | None = None
    """The bank's images nearest to each query in a primary embedding, nearest first, (Q, K) int32."""

    def plain(self) -> tuple[Any, ...]:
        """Return the fields as plain values, for a checkpoint."""
        return (*self[:2], tuple(self.measure), *self[3:])


def read_results(saved: Iterable[Any]) -> list[Result]:
    """Return the results whose :meth:`Result.plain` was saved."""
    return [Result(row, dataset, Measure(*measure), *fields) for row, dataset, measure, *fields in saved]
