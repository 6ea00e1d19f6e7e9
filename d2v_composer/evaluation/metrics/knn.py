"""k-NN classification: does a test sample's label win the vote of the sample's 20 nearest train samples?

The vote is DINO's weighted vote (Caron et al. 2021, arXiv:2104.14294) or the majority.
"""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from d2v_composer.evaluation.metrics.metric import Column, Metric, Pair, Table
from d2v_composer.evaluation.nearest_neighbors import NUM_NEIGHBORS, TEMPERATURE, vote

CLASSIFIERS = Table(
    "probes",
    "Classification of the test samples by probes fitted to the train samples",
    "Do classifiers fitted to the train samples find the right class?",
)


def columns(ks: Sequence[int], sizes: Mapping[str, int]) -> list[Column]:
    k = min(NUM_NEIGHBORS, sizes.get("train", NUM_NEIGHBORS))
    return [
        Column("knn", "train", "knn", k, "knn/top1", f"{k}-NN weighted"),
        Column("knn", "train", "knn_majority", k, "knn_majority/top1", f"{k}-NN majority"),
    ]


def hits(pair: Pair, columns: Sequence[Column]) -> Iterator[Tensor]:
    for column, temperature in zip(columns, (TEMPERATURE, None), strict=True):
        voters = pair.nearest("train", "test", column.k or 0)
        yield vote(voters, pair.labels("train"), temperature) == pair.labels("test")


KNN = Metric(
    "knn", "classifies a sample by its 20 nearest train samples", CLASSIFIERS, frozenset({"labels"}), columns, hits
)
