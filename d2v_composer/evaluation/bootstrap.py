"""Accuracies with their 95 % intervals, and the share of the teacher's advantage that is recovered."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["NUM_RESAMPLES", "RESAMPLES_AT_ONCE", "Interval", "bootstrap", "share_interval", "share_recovered"]

NUM_RESAMPLES = 2000

RESAMPLES_AT_ONCE = 50


class Interval(NamedTuple):
    """An estimate and where it would lie 95 times in 100, were the queries others of their kind."""

    value: float
    low: float
    high: float


def bootstrap(statistic: Callable[[Callable[[NDArray], NDArray]], NDArray], num_queries: int) -> Interval:
    """A statistic of means over the same queries, with its 95 % percentile interval (Efron 1979).

    Args:
        statistic: Given a function from (Q,) values to their mean in each resample, (R,), what is asked for in each,
            (R,).
        num_queries: Q.
    """
    everyone = np.ones((1, num_queries))
    value = float(statistic(lambda values: everyone @ values / num_queries)[0])
    rng = np.random.default_rng(0)
    resampled = []
    for _ in range(NUM_RESAMPLES // RESAMPLES_AT_ONCE):
        drawn = [rng.integers(num_queries, size=num_queries) for _ in range(RESAMPLES_AT_ONCE)]
        counts = np.stack([np.bincount(queries, minlength=num_queries) for queries in drawn])
        resampled.append(statistic(lambda values, counts=counts: counts @ values.astype(float) / num_queries))
    low, high = np.nanpercentile(np.concatenate(resampled), [2.5, 97.5])
    return Interval(value, float(low), float(high))


def share_interval(untrained: NDArray, student: NDArray, teacher: NDArray) -> Interval | None:
    """The part of the teacher's advantage over the untrained student that the student has, from hits of the same
    queries, (Q,) each; ``None``: the teacher has no advantage."""
    if teacher.mean() <= untrained.mean():
        return None

    def share(mean: Callable[[NDArray], NDArray]) -> NDArray:
        advantage = mean(teacher) - mean(untrained)
        # A resample in which the teacher has none says nothing.
        return (mean(student) - mean(untrained)) / np.where(advantage > 0, advantage, np.nan)

    return bootstrap(share, len(student))


def share_recovered(before: float, after: float, teacher: float) -> float | None:
    """The part of the teacher's advantage over the untrained student that training recovered, 1 for all of it."""
    return None if teacher <= before else (after - before) / (teacher - before)
