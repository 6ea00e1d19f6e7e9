"""Neighbor agreement: the share of a sample's 10 nearest test samples that a model and the teacher have in common.

This is mutual k-NN (Huh et al. 2024, arXiv:2405.07987).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from d2v_composer.evaluation.metrics.metric import Column, Metric, Pair, Table
from d2v_composer.evaluation.nearest_neighbors import NUM_COMMON, common_fractions, others_of

WITHOUT_LABELS = Table(
    "without_labels", "Measured without labels", "How good are the embeddings, measured without labels?"
)


def columns(ks: Sequence[int], sizes: Mapping[str, int]) -> list[Column]:
    return [Column("agreement", "", "agreement", NUM_COMMON, f"agreement@{NUM_COMMON}", "neighbor agreement")]


def hits(pair: Pair, columns: Sequence[Column]) -> list[Tensor]:
    return [common_fractions(nearest_others(pair), pair.teacher())]


def nearest_others(pair: Pair) -> Tensor:
    """Return the indices of each test sample's nearest other test samples, (Q, ``NUM_COMMON``)."""
    nearest = pair.nearest("test", "test", NUM_COMMON + 1).indices
    return others_of(nearest, torch.arange(len(nearest), device=nearest.device))


AGREEMENT = Metric(
    "agreement",
    "is the share of a sample's 10 nearest test samples that a model and the teacher have in common",
    WITHOUT_LABELS,
    frozenset({"teacher"}),
    columns,
    hits,
)
