"""Zero-shot classification: is the text embedding of a sample's class among the k nearest to the sample?"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from d2v_composer.evaluation.metrics.metric import CLASSES, Column, Metric, Pair, Table, hits_at


def columns(ks: Sequence[int], sizes: Mapping[str, int]) -> list[Column]:
    used = dict.fromkeys(min(k, sizes.get(CLASSES, k)) for k in ks)
    return [Column("zero_shot", CLASSES, "zero_shot", k, f"zero_shot/top{k}", f"zero-shot top-{k}") for k in used]


def hits(pair: Pair, columns: Sequence[Column]) -> list[Tensor]:
    return hits_at(pair, CLASSES, "test", columns)


ZERO_SHOT = Metric(
    "zero_shot",
    "classifies a sample by the nearest of the set's ``class_embeddings``",
    Table(
        "zero_shot",
        "Zero-shot classification of the test samples by text embeddings of the classes",
        "Is the text embedding of a sample's class among those nearest to the sample?",
    ),
    frozenset({"labels", "texts"}),
    columns,
    hits,
)
