"""Names of metrics and embeddings, and a run's log of metrics in JSON lines."""

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from itertools import product
from operator import index
from pathlib import Path

log = logging.getLogger(__name__)

BANKS = ("train", "test")
AGREEMENT = "agreement@10"
# Name in a config → what it measures: DINO's weighted vote of the nearest neighbors and their majority; a classifier;
# the neighbors in common with the teacher; and, for each k of a retrieval, an image's views.
PROBES: Mapping[str, Sequence[str]] = {
    "knn": ("knn/top1", "knn_majority/top1"),
    "linear": ("linear/top1",),
    "agreement": (AGREEMENT,),
    "instance": ("instance/top{k}",),
}
WITHOUT_LABELS = ("agreement", "instance")
Measure = int | str
"""The k of a retrieval, or what a probe measures on the test split."""
# Logged below health/ as 0 or 1.
HEALTH_STATES = ("collapse", "dead", "diverging", "non_finite", "scaler_skips")


def measures_of(has_labels: bool, ks: Sequence[int], probes: Collection[str]) -> list[tuple[str, Measure]]:
    """Return each measure taken on a set, with its bank: retrieval first, then the probes.

    Classifiers are fitted to the train split; what needs no labels looks up the test images among themselves, bank ''.
    """
    measures: list[tuple[str, Measure]] = [*product(BANKS, ks)] if has_labels else []
    for probe in probes:
        names = dict.fromkeys(name.format(k=k) for name in PROBES[probe] for k in ks)
        measures += product(["" if probe in WITHOUT_LABELS else "train"], names)
    return measures


def metric_key(
    dataset: str, bank: str, measure: Measure, embedding: str | None = None, baseline: str | None = None
) -> str:
    """Return the log key of an accuracy; ``embedding`` defaults to the primary embedding."""
    measured = measure if isinstance(measure, str) else f"bank_{bank}/top{measure}"
    parts = ["metrics", dataset, baseline, measured, embedding]
    return "/".join(part for part in parts if part is not None)


def find_primary(primary: str, names: Collection[str], *, fall_back: bool) -> str:
    """Return the name of the embedding to report as a model's primary embedding.

    Args:
        primary: The embedding asked for.
        names: The model's embeddings; a single one without a name ('') is its own primary embedding.
        fall_back: Accept the output for a mean of layers: the bare encoder has none to average.

    Raises:
        ValueError: The model has no such embedding.
    """
    fallbacks = [primary.replace("layer_mean", "output")] if fall_back else []
    found = next((name for name in [primary, *fallbacks, ""] if name in names), None)
    if found is None:
        raise ValueError(f"primary embedding must be one of {', '.join(names)}, got {primary!r}")
    return found


def read_jsonl(path: Path) -> dict[str, dict[int, float]]:
    """Read a log as key → step → value; if a restart logged a step again, the later value counts.

    Corrupt lines, such as one truncated by a kill, are skipped with a warning.
    """
    series: dict[str, dict[int, float]] = {}
    lines, num_corrupt = path.read_bytes().splitlines(), 0
    for line in lines:
        try:
            entry = json.loads(line)
            step, values = index(entry.pop("step")), {key: float(value) for key, value in entry.items()}
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            num_corrupt += 1
            continue
        for key, value in values.items():
            series.setdefault(key, {})[step] = value
    if num_corrupt:
        log.warning("%s: skipped %d corrupt lines of %d", path, num_corrupt, len(lines))
    return series
