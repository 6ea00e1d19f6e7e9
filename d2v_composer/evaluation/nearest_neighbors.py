"""Find exact nearest neighbors by cosine, and compute accuracies and agreement from the neighbors.

Shapes: N bank samples, Q queries, K neighbors, D channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import normalize

from d2v_composer.models.precision import precision_of

# Bank samples and queries compared at once: 64 MiB of similarities. Larger matrix products are no faster.
BANK_PART, QUERY_PART = 1 << 13, 1 << 11
# Bytes put in order in float64 at once. On a CPU they stay in its cache: allocating more took longer than the rest.
CPU_PART, GPU_PART = 4 << 20, 256 << 20
# A shorter vector counts as this long, as in normalize.
SHORTEST = 1e-12
# How many more than k neighbors are found in float32, so that float64 can choose the k nearest among them.
SPARE = 8
# Columns whose maximum is found first, see top_k.
GROUP_SIZE = 64
# DINO's (Caron et al. 2021, arXiv:2104.14294, eval_knn.py).
NUM_NEIGHBORS = 20
TEMPERATURE = 0.07
# Neighbors among which two models are compared.
NUM_COMMON = 10


class TopK(NamedTuple):
    """Nearest bank samples of each query, nearest first."""

    similarities: Tensor
    """Cosines, (Q, K) float32; from :func:`exact_neighbors` float64."""
    indices: Tensor
    """Indices in the bank, (Q, K) int64."""


def nearest_neighbors(bank: Tensor, queries: Tensor, k: int) -> TopK:
    """Return each query's k nearest neighbors by cosine, nearest first: cosines and bank indices, (Q, k) each.

    Cosines are computed in float32; neighbors with equal cosines come in any order.

    Args:
        bank: Vectors to search, (N, D), of any float dtype.
        queries: Vectors whose neighbors are searched, (Q, D), of any float dtype.
        k: Number of neighbors, from 1 to N.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must be from 1 to {len(bank)}, the number of bank samples; got {k}")
    parts = queries.split(QUERY_PART)
    # Reused: allocating memory for each part would take as long as searching it.
    buffer = bank.new_empty(len(parts[0]) * min(BANK_PART, len(bank)), dtype=torch.float32)
    nearest = [TopK(bank.new_empty(len(part), 0).float(), bank.new_empty(len(part), 0).long()) for part in parts]
    with precision_of(None, bank.device.type):  # less precision would change the order
        for number, bank_ND in enumerate(bank.split(BANK_PART)):
            unit_ND = normalize(bank_ND.float(), dim=1)
            for i, part in enumerate(parts):
                similarities_QN = buffer[: len(part) * len(unit_ND)].view(len(part), len(unit_ND))
                torch.mm(normalize(part.float(), dim=1), unit_ND.T, out=similarities_QN)
                more = top_k(similarities_QN, k)
                similarities = torch.cat([nearest[i].similarities, more.similarities], dim=1)
                indices = torch.cat([nearest[i].indices, more.indices + number * BANK_PART], dim=1)
                similarities, chosen = similarities.topk(min(k, similarities.shape[1]), dim=1)
                nearest[i] = TopK(similarities, indices.gather(1, chosen))
    return TopK(*(torch.cat(tensors) for tensors in zip(*nearest, strict=True)))


def exact_neighbors(bank: Tensor, queries: Tensor, k: int) -> TopK:
    """Return each query's k nearest neighbors by cosine, nearest first: cosines and bank indices, (Q, k) each.

    The k + ``SPARE`` nearest neighbors by float32 cosines are sorted by float64 cosines, then by bank index.
    """
    # Where all samples have much in common, cosines are close to 1 and differ by less than float32 can tell.
    candidates = nearest_neighbors(bank, queries, max(k, min(k + SPARE, len(bank)))).indices.sort(dim=1).values
    part_bytes = CPU_PART if bank.device.type == "cpu" else GPU_PART
    at_once = max(1, part_bytes // (12 * candidates.shape[1] * bank.shape[1]))
    nearest = []
    for indices_QK, part_QD in zip(candidates.split(at_once), queries.split(at_once), strict=True):
        bank_QKD, query_QD1 = bank[indices_QK].double(), normalize(part_QD.double(), dim=1)[:, :, None]
        cosines_QK = (bank_QKD @ query_QD1)[:, :, 0] / vector_norm(bank_QKD, dim=2).clamp(min=SHORTEST)
        cosines_QK, order_QK = cosines_QK.sort(dim=1, descending=True, stable=True)
        nearest.append(TopK(cosines_QK[:, :k], indices_QK.gather(1, order_QK)[:, :k]))
    return TopK(*(torch.cat(parts) for parts in zip(*nearest, strict=True)))


def top_k(similarities_QN: Tensor, k: int) -> TopK:
    """Return the k largest values in each row of a (Q, N) matrix, largest first, and the values' columns.

    If N ≤ k, all values are returned.
    """
    # topk is much slower than a maximum, and the k groups of columns with the largest maxima have the k largest values.
    num_rows, num_columns = similarities_QN.shape
    num_groups = num_columns // GROUP_SIZE
    if k >= num_groups:
        return TopK(*similarities_QN.topk(min(k, num_columns), dim=1))
    num_grouped = num_groups * GROUP_SIZE  # the few remaining columns are all candidates
    grouped = similarities_QN[:, :num_grouped].unflatten(1, (num_groups, GROUP_SIZE))
    groups_QK = grouped.amax(dim=2).topk(k, dim=1).indices
    rows = torch.arange(num_rows, device=similarities_QN.device)[:, None]
    candidates = torch.cat([grouped[rows, groups_QK].flatten(1), similarities_QN[:, num_grouped:]], dim=1)
    similarities, chosen = candidates.topk(k, dim=1)
    in_group = groups_QK.gather(1, (chosen // GROUP_SIZE).clamp(max=k - 1)) * GROUP_SIZE + chosen % GROUP_SIZE
    remaining = chosen - k * GROUP_SIZE + num_grouped
    return TopK(similarities, torch.where(chosen < k * GROUP_SIZE, in_group, remaining))


def retrieval_hits(nearest: Tensor, bank_labels: Tensor, query_labels: Tensor, ks: Sequence[int]) -> list[Tensor]:
    """Return for each k a mask, (Q,) bool: True if any of a query's k nearest bank samples has the query's label.

    Args:
        nearest: Indices from :func:`exact_neighbors`, (Q, K).
        bank_labels: Labels of the bank, (N,) int.
        query_labels: Labels of the queries, (Q,) int.
        ks: Numbers of neighbors, each from 1 to K.
    """
    right_QK = bank_labels[nearest] == query_labels[:, None]
    return [right_QK[:, :k].any(dim=1) for k in ks]


def retrieval_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, ks: Sequence[int] = (1, 3)
) -> dict[int, float]:
    """Return for each k the share of queries with a sample of the same label among the k nearest by cosine.

    Args:
        bank: Embeddings to search, (N, D).
        bank_labels: Labels of the bank, (N,) int.
        queries: Embeddings of the queries, (Q, D), Q ≥ 1.
        query_labels: Labels of the queries, (Q,) int.
        ks: Numbers of neighbors, each from 1 to N.

    Returns:
        k → accuracy from 0 to 1.

    Raises:
        ValueError: A k is out of range.

    Example:
        >>> bank, labels = torch.eye(3), torch.tensor([0, 1, 2])
        >>> retrieval_accuracy(bank, labels, queries=bank[:2], query_labels=torch.tensor([0, 2]), ks=(1, 3))
        {1: 0.5, 3: 1.0}
    """
    hits = retrieval_hits(exact_neighbors(bank, queries, max(ks)).indices, bank_labels, query_labels, ks)
    return {k: hit.double().mean().item() for k, hit in zip(ks, hits, strict=True)}


class Ranks(NamedTuple):
    """The rank of this process, and the number of processes that share the work."""

    rank: int = 0
    world_size: int = 1

    def indices_of_rank(self, num_images: int) -> Tensor:
        """Return the indices of this rank's samples, padded with zeros to the same number on all ranks."""
        mine = torch.arange(num_images)[self.rank :: self.world_size]
        missing = -(-num_images // self.world_size) - len(mine)
        return torch.cat([mine, mine.new_zeros(missing)])

    def rows_of_rank(self, images: Tensor) -> Tensor:
        """Return this rank's rows, see :meth:`indices_of_rank`, of a tensor with a row for each sample, (N, …)."""
        return images if self.world_size == 1 else images[self.indices_of_rank(len(images)).to(images.device)]

    def gather(self, rows: Tensor, num_images: int) -> Tensor:
        """Return the rows of all samples, (N, …), on every rank, given this rank's rows."""
        if self.world_size == 1:
            return rows[:num_images]
        # Not all_gather: gloo's copies in its own threads, each of which starts a pool of OpenMP threads. If these are
        # more than the cores, they sleep at every barrier, and every later operation takes longer.
        gathered = rows.new_empty(self.world_size, *rows.shape)
        gathered[self.rank] = rows
        for rank, received in enumerate(gathered):
            torch.distributed.broadcast(received, src=rank)
        return gathered.transpose(0, 1).flatten(0, 1)[:num_images]


ONE_RANK = Ranks()


def vote(neighbors: TopK, bank_labels: Tensor, temperature: float | None) -> Tensor:
    """Return for each query, (Q,), the label with the most votes among its neighbors; the smallest label wins a tie.

    Args:
        neighbors: Neighbors from :func:`exact_neighbors`, (Q, K).
        bank_labels: Labels of the bank, (N,) int.
        temperature: A neighbor's vote has the weight exp(cosine / temperature); ``None``: all weights are equal.
    """
    classes, numbers = bank_labels.unique(return_inverse=True)
    weights_QK = torch.ones_like(neighbors.similarities)
    if temperature is not None:
        weights_QK = torch.softmax(neighbors.similarities / temperature, dim=1)  # exp alone would overflow
    votes_QC = weights_QK.new_zeros(len(weights_QK), len(classes))
    votes_QC.scatter_add_(1, numbers[neighbors.indices], weights_QK)
    return classes[votes_QC.argmax(dim=1)]  # the first of equal ones


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int = NUM_NEIGHBORS,
    temperature: float | None = TEMPERATURE,
) -> float:
    """Return the share of queries, from 0 to 1, whose label wins the vote of the query's k nearest bank samples.

    Args:
        bank: Embeddings to search, (N, D).
        bank_labels: Labels of the bank, (N,) int.
        queries: Embeddings of the queries, (Q, D), Q ≥ 1.
        query_labels: Labels of the queries, (Q,) int.
        k: Number of neighbors, from 1 to N.
        temperature: Temperature of the votes' weights; see :func:`vote`.

    Raises:
        ValueError: k is out of range.

    Example:
        >>> bank, labels = torch.eye(3), torch.tensor([0, 1, 2])
        >>> knn_accuracy(bank, labels, queries=bank[:2], query_labels=torch.tensor([0, 2]), k=1)
        0.5
    """
    voted = vote(exact_neighbors(bank, queries, k), bank_labels, temperature)
    return (voted == query_labels).double().mean().item()


def neighbor_agreement(embeddings: Tensor, others: Tensor, k: int = NUM_COMMON) -> float:
    """Return the mean share of a sample's k nearest neighbors that two models have in common, from 0 to 1.

    This is mutual k-NN (Huh et al. 2024, arXiv:2405.07987). Chance is k / (N - 1).

    Args:
        embeddings: One model's embeddings, (N, D).
        others: The other model's embeddings of the same samples, (N, D'), with any number of channels D'.
        k: Number of neighbors, from 1 to N - 1.

    Raises:
        ValueError: k is out of range.

    Example:
        >>> student, teacher = torch.randn(100, 8), torch.randn(100, 16)
        >>> chance = neighbor_agreement(student, teacher)  # about 10 / 99
        >>> neighbor_agreement(student, 2 * student)
        1.0
    """
    return common_fractions(*(nearest_others(images, k) for images in (embeddings, others))).mean().item()


def nearest_others(images: Tensor, k: int = NUM_COMMON) -> Tensor:
    """Return the indices of the k other samples nearest to each sample by cosine, nearest first, (N, k) int64.

    Args:
        images: Embeddings of all samples, (N, D).
        k: Number of neighbors, from 1 to N - 1.
    """
    if not 1 <= k < len(images):
        raise ValueError(f"k must be from 1 to {len(images) - 1}, the number of other samples; got {k}")
    nearest = exact_neighbors(images, images, k + 1).indices
    return others_of(nearest, torch.arange(len(images), device=nearest.device))


def others_of(nearest: Tensor, places: Tensor) -> Tensor:
    """Return the bank indices of the K samples nearest to each query, without the query itself, (Q, K).

    Args:
        nearest: Bank indices of each query's K + 1 nearest samples, nearest first, (Q, K + 1).
        places: Bank index of each query, (Q,).
    """
    is_other = nearest != places[:, None]
    is_other[is_other.all(dim=1), -1] = False  # a sample with many copies need not be among its nearest
    return nearest[is_other].view(len(places), -1)


def common_fractions(nearest: Tensor, reference: Tensor) -> Tensor:
    """Return the share of each sample's neighbors, (N, K), that are also in ``reference``, (N, K): (N,) float64."""
    return (nearest[:, :, None] == reference.to(nearest.device)[:, None]).any(dim=2).double().mean(dim=1)
