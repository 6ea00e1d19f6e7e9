"""Embed a labeled set, look up each split's images among the other split's, and probe the embeddings.

Several ranks share the work. Shapes: B images of a batch, N of a split, Q queries, D channels.
"""

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from d2v_composer.data.labeled import LabeledSet
from d2v_composer.evaluation.linear_probe import LinearProbe, fit_linear_probe
from d2v_composer.evaluation.metrics import BANKS, Measure
from d2v_composer.evaluation.nearest_neighbors import (
    NUM_NEIGHBORS,
    ONE_RANK,
    Ranks,
    TopK,
    exact_neighbors,
    majority_vote,
    retrieval_hits,
    weighted_vote,
)
from d2v_composer.system.command_line import progress_bar

# MERGED FROM d2v_composer/evaluation/labeled_retrieval.py: The type of a function that embeds images.

Embed = Callable[[Tensor], Tensor | dict[str, Tensor]]
"""(B, 3, height, width) uint8 images on the model's device → (B, D), or several embeddings by name."""


ModelT = TypeVar("ModelT", bound=Hashable)

EmbeddedSet = dict[str, dict[str, Tensor]]
"""Split ('train', 'test') → embedding → this rank's share, (share, D) float32 on the host."""


class Found(NamedTuple):
    """The neighbors of one split's images in the other split, with one embedding."""

    embedding: str
    """'' for an only one without a name."""
    bank: str
    """The split that was searched: 'train' or 'test'."""
    nearest: Tensor
    """(Q, K) int64: bank indices, nearest first."""
    hits: dict[Measure, Tensor]
    """k → (Q,) bool: whether any of the k nearest has the query's label; with bank 'train', also what a probe measures
    → (Q,) bool: whether it gives the query its label."""
    linear: LinearProbe | None = None
    """Of bank 'train', if it was asked for."""


def embed_set(
    embeds: Mapping[ModelT, Embed],
    labeled: LabeledSet,
    batch_size: int,
    to_device: Callable[[Tensor], Tensor],
    ranks: Ranks = ONE_RANK,
    progress: str | None = None,
) -> dict[ModelT, EmbeddedSet]:
    """Embed this rank's share of both splits with every model, in one pass over the images.

    Args:
        embeds: Model → embed function.
        labeled: The images.
        batch_size: Images embedded at once on each rank.
        to_device: Moves a tensor to the model's device.
        ranks: The processes that share the images.
        progress: The label of the progress bar; ``None``: no bar.
    """
    embedded: dict[ModelT, EmbeddedSet] = {model: {} for model in embeds}
    for split in BANKS:
        images = getattr(labeled, split).images
        batches: dict[ModelT, list[dict[str, Tensor]]] = {model: [] for model in embeds}
        parts = ranks.share(len(images)).split(batch_size)
        for indices in progress_bar(parts, desc=f"{progress} {split}", unit="batches", disable=progress is None):
            batch = to_device(images[indices])
            for model, embed in embeds.items():
                embeddings = embed(batch)
                embeddings = {"": embeddings} if isinstance(embeddings, Tensor) else embeddings
                batches[model].append({name: each.float().cpu() for name, each in embeddings.items()})
        for model, parts_of in batches.items():
            names = list(parts_of[0])
            # Popped, so that not all are held twice.
            embedded[model][split] = {name: torch.cat([part.pop(name) for part in parts_of]) for name in names}
    return embedded


def look_up(
    embedded: EmbeddedSet,
    labeled: LabeledSet,
    ks: Sequence[int],
    to_device: Callable[[Tensor], Tensor],
    ranks: Ranks = ONE_RANK,
    probes: Collection[str] = (),
) -> Iterator[Found]:
    """Look up each split among the other, one embedding after the other; each rank takes its share of the queries.

    Args:
        embedded: Of :func:`embed_set`, of one model; emptied, since all images in all embeddings would take gigabytes.
        labeled: The labels.
        ks: The k to count hits for.
        to_device: Moves a tensor to the device that searches.
        ranks: As given to :func:`embed_set`.
        probes: Names of ``PROBES``: classify the test images, too.
    """
    labels = {split: getattr(labeled, split).labels for split in BANKS}
    for name in list(embedded["train"]):
        images = {split: ranks.gather(to_device(embedded[split].pop(name)), len(labels[split])) for split in BANKS}
        for bank, query in (BANKS, BANKS[::-1]):
            votes = bank == "train" and "knn" in probes
            k = max(*ks, min(NUM_NEIGHBORS, len(labels[bank]))) if votes else max(ks)
            neighbors = exact_neighbors(images[bank], ranks.take_share(images[query]), k)
            nearest = ranks.gather(neighbors.indices[:, : max(ks)], len(labels[query]))
            bank_labels, query_labels = (labels[split].to(nearest.device) for split in (bank, query))
            hits: dict[Measure, Tensor] = {**retrieval_hits(nearest, bank_labels, query_labels, ks)}
            if votes:
                voters = TopK(*(each[:, :NUM_NEIGHBORS] for each in neighbors))
                for measure, vote in {"knn": weighted_vote, "knn_majority": majority_vote}.items():
                    hits[measure] = ranks.gather(vote(voters, bank_labels), len(query_labels)) == query_labels
            linear = None
            if bank == "train" and "linear" in probes:
                linear = fit_linear_probe(images[bank], bank_labels, ranks=ranks)
                hits["linear"] = linear.predict(images[query]) == query_labels
            yield Found(name, bank, nearest, hits, linear)
