"""Instance retrieval: is the second augmented view of a test sample among the k second views nearest to the first?"""

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
