"""Judge embeddings without labels, by their neighbors in another model.

Shapes: N images, K neighbors, D channels.
"""

from torch import Tensor

from d2v_composer.evaluation.nearest_neighbors import ONE_RANK, Ranks, exact_neighbors

NUM_COMMON = 10


def neighbor_agreement(embeddings: Tensor, others: Tensor, k: int = NUM_COMMON) -> float:
    """Return the mean share of an image's k nearest neighbors that two models have in common, from 0 to 1.

    This is mutual k-NN (Huh et al. 2024, arXiv:2405.07987). Chance is k / (N - 1).

    Args:
        embeddings: One model's embeddings, (N, D).
        others: The other model's of the same images, (N, D of its own).
        k: From 1 to N - 1.

    Raises:
        ValueError: k is out of range.

    Example:
        >>> student, teacher = torch.randn(100, 8), torch.randn(100, 16)
        >>> chance = neighbor_agreement(student, teacher)  # about 10 / 99
        >>> neighbor_agreement(student, 2 * student)
        1.0
    """
    return common_shares(*(nearest_others(each, k) for each in (embeddings, others))).mean().item()


def nearest_others(images: Tensor, k: int = NUM_COMMON, ranks: Ranks = ONE_RANK, bank: Tensor | None = None) -> Tensor:
    """Return the indices of the k other images nearest to each image by cosine, nearest first, (N, k) int64.

    Args:
        images: (N, D), on every rank all of them.
        k: From 1 to N - 1.
        ranks: The processes that share the work.
        bank: Another model's embeddings of the same images, (N, D), among which to search; default ``images``.

    Raises:
        ValueError: k is out of range.
    """
    if not 1 <= k < len(images):
        raise ValueError(f"k must be from 1 to {len(images) - 1}, the number of other images; got {k}")
    found = exact_neighbors(images if bank is None else bank, ranks.take_share(images), k + 1).indices
    is_other = found != ranks.share(len(images)).to(found.device)[:, None]
    is_other[is_other.all(dim=1), k] = False  # an image with many copies need not be among its nearest
    return ranks.gather(found[is_other].view(-1, k), len(images))


def common_shares(nearest: Tensor, others: Tensor) -> Tensor:
    """Return the share of each image's K neighbors, (N, K), that two models have in common: (N,) float64."""
    return (nearest[:, :, None] == others.to(nearest.device)[:, None]).any(dim=2).double().mean(dim=1)
