"""A linear probe: logistic regression, fitted to the train samples and measured on the test samples."""

import logging
from collections.abc import Mapping, Sequence
from functools import cache

from torch import Tensor

from d2v_composer.evaluation.linear_probe import fit_linear_probe
from d2v_composer.evaluation.metrics.knn import CLASSIFIERS
from d2v_composer.evaluation.metrics.metric import Column, Metric, Pair

warn_once = cache(logging.getLogger(__name__).warning)
"""Logs each warning only once per process."""


def columns(ks: Sequence[int], sizes: Mapping[str, int]) -> list[Column]:
    return [Column("linear", "train", "linear", None, "linear/top1", "linear probe")]


def hits(pair: Pair, columns: Sequence[Column]) -> list[Tensor]:
    probe = fit_linear_probe(pair.bank("train"), pair.labels("train"))  # each rank fits the same probe, in seconds
    if pair.title and not probe.converged:
        warn_once(f"{pair.title}: the linear probe has not converged; its accuracy may be too low")
    return [probe.predict(pair.queries("test")) == pair.labels("test")]


LINEAR = Metric(
    "linear",
    "classifies a sample by a logistic regression, fitted to the train samples",
    CLASSIFIERS,
    frozenset({"labels"}),
    columns,
    hits,
)
