"""Zero-shot retrieval: does an image's nearest neighbour have its label? Pure functions of tensors.

Shapes: N bank images, Q queries, D channels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["nearest_neighbours", "retrieval_accuracy", "retrieval_hits"]

# Similarities held at once, in floats: 256 MB. Larger chunks are no faster.
CHUNK_FLOATS = 64 * 2**20


def nearest_neighbours(bank: Tensor, queries: Tensor, k: int) -> Tensor:
    """The bank indices of each query's k nearest by cosine, nearest first: (Q, k) int64.

    Exact, float32, in chunks of queries, so that memory stays bounded whatever Q is.

    Args:
        bank: (N, D), any float dtype, any length.
        queries: (Q, D), likewise.
        k: From 1 to N.

    Raises:
        ValueError: The shapes do not fit, or k is out of range.
    """
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise ValueError(
            f"bank (N, D) and queries (Q, D) must agree in D, got {tuple(bank.shape)}, {tuple(queries.shape)}"
        )
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must be from 1 to the bank's {len(bank)} images, got {k}")
    bank_ND = normalize(bank.float(), dim=1)
    queries_QD = normalize(queries.float(), dim=1)
    chunk = max(1, CHUNK_FLOATS // len(bank))
    with full_float32(bank.device.type):
        neighbours = [(part @ bank_ND.T).topk(k, dim=1).indices for part in queries_QD.split(chunk)]
    return torch.cat(neighbours) if neighbours else torch.empty(0, k, dtype=torch.int64, device=bank.device)


@contextmanager
def full_float32(device: str) -> Iterator[None]:
    """Neither autocast nor TF32, which Composer turns on: they round the similarities, and with them the order."""
    allow_tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allow_tf32


def retrieval_hits(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, ks: Sequence[int]
) -> dict[int, Tensor]:
    """Whether any of a query's k nearest bank images has its label: k → (Q,) bool. See :func:`retrieval_accuracy`."""
    neighbours = nearest_neighbours(bank, queries, max(ks))
    right_QK = bank_labels[neighbours] == query_labels[:, None]
    return {k: right_QK[:, :k].any(dim=1) for k in ks}


def retrieval_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, ks: Sequence[int] = (1, 3)
) -> dict[int, float]:
    """The share of queries of which any of the k nearest bank images, by cosine, has the query's label.

    Args:
        bank: (N, D).
        bank_labels: (N,) int.
        queries: (Q, D), Q ≥ 1.
        query_labels: (Q,) int.
        ks: Each from 1 to N.

    Returns:
        k → accuracy from 0 to 1.

    Raises:
        ValueError: The shapes do not fit, a k is out of range, or there is no query.
    """
    if len(bank) != len(bank_labels) or len(queries) != len(query_labels):
        raise ValueError(
            f"every image needs one label, got {len(bank_labels)} for {len(bank)} in the bank and "
            f"{len(query_labels)} for {len(queries)} queries"
        )
    if not len(queries):
        raise ValueError("there is no query")
    hits = retrieval_hits(bank, bank_labels, queries, query_labels, ks)
    return {k: hit.double().mean().item() for k, hit in hits.items()}
