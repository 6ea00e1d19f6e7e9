"""Embed a labelled set, and look up each split's images among the other split's.

Several ranks share the work. Shapes: B images of a batch, N of a split, Q queries, D channels, W ranks.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from d2v_composer.data.labelled_sets import LabelledSet
from d2v_composer.evaluation.embed_function import Embed
from d2v_composer.evaluation.metric_names import BANKS
from d2v_composer.evaluation.retrieval import nearest_neighbours, retrieval_hits
from d2v_composer.system.progress import progress_bar

__all__ = ["EmbeddedSet", "Found", "Ranks", "embed_set", "look_up"]

ModelT = TypeVar("ModelT", bound=Hashable)

EmbeddedSet = dict[str, dict[str, Tensor]]
"""Split ('train', 'test') → embedding → this rank's share, (share, D) float32 on the host."""


class Ranks(NamedTuple):
    """This process among those that share an evaluation."""

    rank: int = 0
    world_size: int = 1

    def share(self, num_images: int) -> Tensor:
        """Return the indices of this rank: every W-th, padded so that all ranks have equally many."""
        mine = torch.arange(self.rank, num_images, self.world_size)
        missing = -(-num_images // self.world_size) - len(mine)
        return torch.cat([mine, mine.new_zeros(missing)])

    def take_share(self, images: Tensor) -> Tensor:
        """Return the rows of this rank's images."""
        return images if self.world_size == 1 else images[self.share(len(images)).to(images.device)]

    def gather(self, share: Tensor, num_images: int) -> Tensor:
        """Return the shares of all ranks in the order of the images, (N, …)."""
        if self.world_size == 1:
            return share[:num_images]
        return self._all_gather(share).transpose(0, 1).flatten(0, 1)[:num_images]

    def _all_gather(self, share: Tensor) -> Tensor:
        """Return all shares, which have one shape: (W, …)."""
        shares = share.new_empty(self.world_size, *share.shape)
        if not share.is_cpu:
            torch.distributed.all_gather_into_tensor(shares.flatten(0, 1), share.contiguous())
            return shares
        # gloo's all_gather copies in its own threads, each of which starts a pool of OpenMP threads. Once there are
        # more of them than cores, they sleep at every barrier, and every later operation takes longer.
        shares[self.rank] = share
        for rank, received in enumerate(shares):
            torch.distributed.broadcast(received, src=rank)
        return shares


ONE_RANK = Ranks()


class Found(NamedTuple):
    """The neighbours of one split's images in the other split, with one embedding."""

    embedding: str
    """'' for an only one without a name."""
    bank: str
    """The split that was searched: 'train' or 'test'."""
    nearest: Tensor
    """(Q, K) int64: bank indices, nearest first."""
    hits: dict[int, Tensor]
    """k → (Q,) bool: whether any of the k nearest has the query's label."""


def embed_set(
    embeds: Mapping[ModelT, Embed],
    labelled: LabelledSet,
    batch_size: int,
    to_device: Callable[[Tensor], Tensor],
    ranks: Ranks = ONE_RANK,
    progress: str | None = None,
) -> dict[ModelT, EmbeddedSet]:
    """Embed this rank's share of both splits with every model, in one pass over the images.

    Args:
        embeds: Model → embed function.
        labelled: The images.
        batch_size: Images embedded at once on each rank.
        to_device: Moves a tensor to the model's device.
        ranks: The processes that share the images.
        progress: The label of the progress bar; ``None``: no bar.
    """
    embedded: dict[ModelT, EmbeddedSet] = {model: {} for model in embeds}
    for split in BANKS:
        images = getattr(labelled, split).images
        batches: dict[ModelT, list[dict[str, Tensor]]] = {model: [] for model in embeds}
        parts = ranks.share(len(images)).split(batch_size)
        for indices in progress_bar(parts, desc=f"{progress} {split}", unit="batches", disable=progress is None):
            batch = to_device(images[indices])
            for model, embed in embeds.items():
                embeddings = embed(batch)
                embeddings = {"": embeddings} if isinstance(embeddings, Tensor) else embeddings
                batches[model].append({name: each.float().cpu() for name, each in embeddings.items()})
        for model, parts_of in batches.items():
            embedded[model][split] = {name: torch.cat([part[name] for part in parts_of]) for name in parts_of[0]}
    return embedded


def look_up(
    embedded: EmbeddedSet,
    labelled: LabelledSet,
    ks: Sequence[int],
    to_device: Callable[[Tensor], Tensor],
    ranks: Ranks = ONE_RANK,
) -> Iterator[Found]:
    """Look up each split among the other, one embedding after the other; each rank takes its share of the queries.

    Args:
        embedded: Of :func:`embed_set`, of one model; emptied, since all images in all embeddings would take gigabytes.
        labelled: The labels.
        ks: The k to count hits for.
        to_device: Moves a tensor to the device that searches.
        ranks: As given to :func:`embed_set`.
    """
    labels = {split: getattr(labelled, split).labels for split in BANKS}
    for name in list(embedded["train"]):
        images = {split: ranks.gather(to_device(embedded[split].pop(name)), len(labels[split])) for split in BANKS}
        for bank, query in (BANKS, BANKS[::-1]):
            nearest = nearest_neighbours(images[bank], ranks.take_share(images[query]), max(ks))
            nearest = ranks.gather(nearest, len(labels[query]))
            bank_labels, query_labels = (labels[split].to(nearest.device) for split in (bank, query))
            yield Found(name, bank, nearest, retrieval_hits(nearest, bank_labels, query_labels, ks))
