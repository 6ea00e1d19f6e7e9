"""Results of an evaluation: hits of each query; accuracies, intervals and the teacher gap closed.

Shapes: Q queries, K neighbors.
"""

from collections.abc import Iterable, Mapping
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from d2v_composer.evaluation.metrics.metric import BANKS, Column
from d2v_composer.evaluation.metrics.retrieval import retrieval_from
from d2v_composer.evaluation.rows import GAP, GAPS, ROWS, STUDENT, metric_key
from d2v_composer.evaluation.run_log import Log

NUM_RESAMPLES = 2000
Hits = NDArray[np.bool_ | np.float64]
"""A model's result for each query, (Q,): True if the query is right, or a share from 0 to 1."""


class Result(NamedTuple):
    """A column of one row's embedding on one data set."""

    row: str
    """The row's title."""
    dataset: str
    column: Column
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

    def plain(self) -> dict[str, Any]:
        """Return the fields as plain values, for a checkpoint."""
        return self._asdict() | {"column": self.column._asdict()}


def read_results(saved: Iterable[Mapping[str, Any]]) -> list[Result]:
    """Return the results whose :meth:`Result.plain` was saved."""
    return [Result(**{**fields, "column": Column(**fields["column"])}) for fields in saved]


def last_batch(results: Iterable[Result]) -> int:
    """Return the batch after which a run last measured its student; 0 if it did not."""
    return max((result.batch for result in results if result.row == STUDENT), default=0)


class Interval(NamedTuple):
    """An estimate with its 95 % percentile interval over resampled queries (Efron 1979)."""

    value: float
    low: float
    high: float
    note: str = ""
    """How many resamples are left out, in parentheses; '' for none."""


def pivot(results: Iterable[Result], dataset: str) -> dict[Column, dict[str, Interval | None]]:
    """Return column → row → accuracy on a data set, in each row's primary embedding; further rows follow ``ROWS``.

    The last rows are the teacher gaps closed, :data:`GAPS`: ``None`` if there is no gap, and left out if one of the
    three models was not measured.
    """
    columns: dict[Column, dict[str, Hits]] = {}
    for result in sorted(results, key=lambda result: (*ROWS, result.row).index(result.row)):
        if result.dataset == dataset and result.is_primary:
            columns.setdefault(result.column, {})[result.row] = result.hits.numpy()
    return {
        column: {row: accuracy_interval(hits) for row, hits in rows.items()}
        | {
            gap: gap_closed_interval(*(rows[row] for row in models))
            for gap, models in GAPS.items()
            if rows.keys() >= {*models}
        }
        for column, rows in columns.items()
    }


def accuracy_interval(hits: Hits) -> Interval:
    """Return the mean of the queries' hits, fractions or differences of hits, (Q,), with its interval."""
    return Interval(float(hits.mean()), *np.percentile(resample(hits), [2.5, 97.5]).tolist())


def gap_closed_interval(*hits: Hits) -> Interval | None:
    """Return the teacher gap closed with its interval, ``None`` for no gap, from the three models' hits, (Q,) each."""
    value, *resampled = (gap_closed(*accuracies) for accuracies in ([array.mean() for array in hits], *resample(*hits)))
    if value is None:
        return None
    low, high = np.percentile([closed for closed in resampled if closed is not None], [2.5, 97.5]).tolist()
    without_gap = resampled.count(None)
    note = f" ({without_gap:,} of {NUM_RESAMPLES:,} resamples have no gap)" if without_gap else ""
    return Interval(value, low, high, note)


def gap_closed(untrained: float, student: float, teacher: float) -> float | None:
    """Return the teacher gap closed: the fraction of the gap from untrained student to teacher, 1 for all of it.

    ``None`` if the teacher is no better than the untrained student.
    """
    return None if teacher <= untrained else float((student - untrained) / (teacher - untrained))


def gap_closed_by_step(
    log: Log, dataset: str, embedding: str, k: int = 1, baselines: Log | None = None
) -> dict[int, float]:
    """Return step → teacher gap closed: the mean over both banks, or the value for the only bank with a gap.

    Args:
        log: Log of the student's run.
        dataset: Name of the labeled set.
        embedding: Name of the embedding, the same for student and teacher.
        k: The k of top-k.
        baselines: The log with the untrained student (``retrieval.at_start``) and the teacher
            (``retrieval.baselines``); default ``log``.

    Returns:
        Empty if untrained student or teacher is missing, or if there is no gap in either bank.
    """
    values: dict[int, list[float]] = {}
    for bank in BANKS:
        options = dataset, retrieval_from(bank, k), embedding
        untrained, _, teacher = ((baselines or log).get(metric_key(*options, row), {}) for row in GAP)
        for step, accuracy in log.get(metric_key(*options), {}).items() if 0 in untrained and teacher else ():
            closed = gap_closed(untrained[0], accuracy, teacher[max(teacher)])
            if closed is not None:
                values.setdefault(step, []).append(closed)
    return {step: mean(values[step]) for step in sorted(values)}


def resample(*hits: Hits) -> NDArray[np.float64]:
    """Return the accuracies of S models in each bootstrap resample of their common queries, (R, S).

    Queries that the same models get right are interchangeable, so only the number of queries of each kind is drawn.

    Args:
        hits: Hits of each model, (Q,) each.
    """
    kinds, counts = np.unique(np.stack(hits, axis=1), axis=0, return_counts=True)
    num_queries = counts.sum()
    drawn = np.random.default_rng(0).multinomial(num_queries, counts / num_queries, size=NUM_RESAMPLES)
    return drawn @ kinds / num_queries
