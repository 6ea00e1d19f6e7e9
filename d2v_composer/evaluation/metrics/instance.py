"""Instance retrieval: are the two augmented views of a test sample near to each other?

A test sample is a hit if its second view is among the k second views that are nearest to its first view.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from d2v_composer.evaluation.metrics.agreement import WITHOUT_LABELS
from d2v_composer.evaluation.metrics.metric import VIEWS, Column, Metric, Pair, hits_at


def columns(ks: Sequence[int], sizes: Mapping[str, int]) -> list[Column]:
    return [Column("instance", "", "instance", k, f"instance/top{k}", f"instance top-{k}") for k in ks]


def hits(pair: Pair, columns: Sequence[Column]) -> list[Tensor]:
    return hits_at(pair, VIEWS[1], VIEWS[0], columns)


INSTANCE = Metric(
    "instance",
    "finds a sample's second augmented view, given the first, among the second views of all test samples",
    WITHOUT_LABELS,
    frozenset({"views"}),
    columns,
    hits,
)
