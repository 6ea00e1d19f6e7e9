"""Classify images by a vote of their nearest neighbours. Pure functions of tensors.

Shapes: N bank images, Q queries, K neighbours, D channels.
"""

import torch
from torch import Tensor

from d2v_composer.evaluation.retrieval import TopK, exact_neighbours

__all__ = ["NUM_NEIGHBOURS", "knn_accuracy", "majority_vote", "weighted_vote"]

# DINO's (Caron et al. 2021, https://arxiv.org/abs/2104.14294, and its eval_knn.py).
NUM_NEIGHBOURS = 20
TEMPERATURE = 0.07


def weighted_vote(neighbours: TopK, bank_labels: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Return each query's label by DINO's vote, (Q,): a neighbour counts exp(cosine / temperature).

    The smallest label wins a tie.

    Args:
        neighbours: (Q, K) from :func:`exact_neighbours`.
        bank_labels: (N,) int.
        temperature: The lower, the more the nearest count.
    """
    differences_QK = neighbours.similarities - neighbours.similarities.amax(dim=1, keepdim=True)  # exp would overflow
    return _vote(bank_labels[neighbours.indices], (differences_QK / temperature).exp())


def majority_vote(neighbours: TopK, bank_labels: Tensor) -> Tensor:
    """Return the label of most neighbours of each query, (Q,); the smallest of a tie, as scikit-learn's classifier."""
    return _vote(bank_labels[neighbours.indices], torch.ones_like(neighbours.similarities))


def _vote(labels_QK: Tensor, weights_QK: Tensor) -> Tensor:
    """Return the label with the largest sum of weights; argmax returns the first, here the smallest, of a tie."""
    labels_QK, order_QK = labels_QK.sort(dim=1)
    weights_QK = weights_QK.gather(1, order_QK)
    is_same_QKK = labels_QK[:, :, None] == labels_QK[:, None, :]
    votes_QK = torch.where(is_same_QKK, weights_QK[:, None, :], 0).sum(dim=2)
    return labels_QK.gather(1, votes_QK.argmax(dim=1, keepdim=True))[:, 0]


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int = NUM_NEIGHBOURS,
    temperature: float | None = TEMPERATURE,
) -> float:
    """Return the share of queries whose label wins the vote of their k nearest bank images by cosine, from 0 to 1.

    Args:
        bank: (N, D).
        bank_labels: (N,) int.
        queries: (Q, D), Q ≥ 1.
        query_labels: (Q,) int.
        k: From 1 to N.
        temperature: Of :func:`weighted_vote`; ``None``: :func:`majority_vote`.

    Raises:
        ValueError: The shapes do not agree, or k is out of range.
    """
    found = exact_neighbours(bank, queries, k)
    voted = majority_vote(found, bank_labels) if temperature is None else weighted_vote(found, bank_labels, temperature)
    return (voted == query_labels).double().mean().item()
