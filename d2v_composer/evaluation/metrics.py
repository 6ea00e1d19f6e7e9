"""Names of metrics and embeddings, and a run's log of metrics in JSON lines."""

import json
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from operator import index
from pathlib import Path
from typing import NamedTuple

from d2v_composer.evaluation.nearest_neighbors import NUM_NEIGHBORS
from d2v_composer.evaluation.without_labels import NUM_COMMON

BANKS = ("train", "test")
UNTRAINED, STUDENT, TEACHER = GAP = ("untrained student", "student", "teacher")
"""The models between which the teacher gap lies; agreement compares with the teacher."""
ROWS = ("pixels", "log_mel", "encoder", *GAP)
"""A run's models by name, in the order of tables; log keys, tables, report and plots have the same names."""
# Logged below health/ as 0 or 1.
HEALTH_STATES = ("collapse", "dead", "diverging", "non_finite", "scaler_skips")
Log = Mapping[str, Mapping[int, float]]
"""Key → step → value."""


class Measure(NamedTuple):
    """A measure that scores each query of a data set."""

    bank: str
    """The split that is searched, or that a classifier is fitted to; '' for the test images among themselves, classes
    for text embeddings of the classes."""
    name: str
    k: int | None
    """The number of neighbors; ``None``: a classifier has none."""
    key: str
    """Its part of a log key."""
    heading: str
    """The heading of its column in tables."""


def retrieval_from(bank: str, k: int) -> Measure:
    """Return the measure of retrieval: a query is a hit if any of its k nearest in the bank has its label."""
    if bank == "classes":
        return Measure(bank, "zero_shot", k, f"zero_shot/top{k}", f"zero-shot top-{k}")
    return Measure(bank, "retrieval", k, f"bank_{bank}/top{k}", f"bank {bank} top-{k}")


def instance_retrieval(k: int) -> Measure:
    """Return the measure of instance retrieval: a view is a hit if the image's other view is among its k nearest."""
    return Measure("", "instance", k, f"instance/top{k}", f"instance top-{k}")


KNN = Measure("train", "knn", NUM_NEIGHBORS, "knn/top1", "20-NN weighted")
KNN_MAJORITY = Measure("train", "knn_majority", NUM_NEIGHBORS, "knn_majority/top1", "20-NN majority")
LINEAR = Measure("train", "linear", None, "linear/top1", "linear probe")
AGREEMENT = Measure("", "agreement", NUM_COMMON, "agreement@10", "neighbor agreement")
# Name in a config → what it measures: DINO's weighted vote of the nearest neighbors and their majority; a classifier;
# the neighbors in common with the teacher; and, for each k of a retrieval, an image's views and its class by text.
PROBES: Mapping[str, Sequence[Measure] | Callable[[int], Measure]] = {
    "knn": (KNN, KNN_MAJORITY),
    "linear": (LINEAR,),
    "agreement": (AGREEMENT,),
    "instance": instance_retrieval,
    "zero_shot": partial(retrieval_from, "classes"),
}
WITHOUT_LABELS = ("agreement", "instance")


def metric_key(dataset: str, measure: Measure, embedding: str = "", row: str = STUDENT) -> str:
    """Return the log key of an accuracy; by default of the primary embedding. The student's key names no model."""
    model = "" if row in (UNTRAINED, STUDENT) else row
    return "/".join(filter(None, ["metrics", dataset, model, measure.key, embedding]))


def find_primary(primary: str, names: Collection[str]) -> str:
    """Return the name of the embedding to report as a model's primary embedding.

    Args:
        primary: The embedding asked for. For ``layer_mean`` and ``projected``, the output will do: the bare encoder has
            neither.
        names: The model's embeddings; a single one without a name ('') is its own primary embedding.

    Raises:
        ValueError: The model has no such embedding.
    """
    for name in (primary, re.sub("^(layer_mean|projected)", "output", primary), "output_mean_patches", ""):
        if name in names:
            return name
    raise ValueError(f"primary embedding must be one of {', '.join(names)}, got {primary!r}")


def read_lines(path: Path) -> list[tuple[bytes, int, dict[str, float]]]:
    """Read each line of a log, its step and its values.

    Corrupt lines, such as one truncated by a kill, are skipped with a warning.
    """
    lines, found = path.read_bytes().splitlines(), []
    for line in lines:
        with suppress(ValueError, TypeError, AttributeError, KeyError, RecursionError):
            entry = json.loads(line)
            found.append((line, index(entry.pop("step")), {key: float(value) for key, value in entry.items()}))
    if num_corrupt := len(lines) - len(found):
        logging.getLogger(__name__).warning("%s: skipped %d corrupt lines of %d", path, num_corrupt, len(lines))
    return found


def read_jsonl(path: Path) -> dict[str, dict[int, float]]:
    """Read a log as key → step → value; if a step was logged again, the later value counts. See :func:`read_lines`."""
    series: dict[str, dict[int, float]] = {}
    for _, step, values in read_lines(path):
        for key, value in values.items():
            series.setdefault(key, {})[step] = value
    return series
