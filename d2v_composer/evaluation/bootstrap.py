"""95 % intervals of accuracies, and the share of the teacher's advantage that training recovered.

Shapes: Q queries, S candidates, R resamples.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "accuracy_interval", "share_interval", "share_recovered"]

NUM_RESAMPLES = 2000


class Interval(NamedTuple):
    """An estimate with its 95 % percentile interval over resampled queries (Efron 1979)."""

    value: float
    low: float
    high: float


def accuracy_interval(hits: NDArray[np.bool_]) -> Interval:
    """Return the share of hits, (Q,), with its interval."""
    return Interval(float(hits.mean()), *_middle_95_percent(resample(hits)))


def share_interval(
    untrained: NDArray[np.bool_], student: NDArray[np.bool_], teacher: NDArray[np.bool_]
) -> Interval | None:
    """Return :func:`share_recovered` with its interval, from the hits on the same queries, (Q,) each."""
    value = share_recovered(untrained.mean(), student.mean(), teacher.mean())
    if value is None:
        return None
    resampled = [share_recovered(*accuracies) for accuracies in resample(untrained, student, teacher)]
    return Interval(value, *_middle_95_percent([share for share in resampled if share is not None]))


def share_recovered(untrained: float, student: float, teacher: float) -> float | None:
    """Return the part of the teacher's advantage over the untrained student that the student has.

    1 means all of it; ``None`` that the teacher has no advantage.
    """
    return None if teacher <= untrained else float((student - untrained) / (teacher - untrained))


def resample(*hits: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the accuracies of S candidates in each bootstrap resample of their common queries, (R, S).

    Queries that the same candidates get right are interchangeable, so that only the number of each such kind is drawn.

    Args:
        hits: (Q,) of each candidate.
    """
    kinds, counts = np.unique(np.stack(hits, axis=1), axis=0, return_counts=True)
    num_queries = counts.sum()
    drawn = np.random.default_rng(0).multinomial(num_queries, counts / num_queries, size=NUM_RESAMPLES)
    return drawn @ kinds / num_queries


def _middle_95_percent(values: NDArray[np.float64] | list[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
