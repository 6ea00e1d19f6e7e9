"""Instance retrieval: does one augmented view of a sample find the other view among those of all test samples?"""

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
    "looks for an augmented view of a sample among those of all test samples, given another view",
    WITHOUT_LABELS,
    frozenset({"views"}),
    columns,
    hits,
)
