"""Embed a labeled set, look up each split's images among the other split's, and probe the embeddings.

Several ranks share the work. Shapes: B images of a batch, N of a split, Q queries, D channels.
"""

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from d2v_composer.evaluation.linear_probe import fit_linear_probe
from d2v_composer.evaluation.metrics import BANKS, Measure
from d2v_composer.evaluation.nearest_neighbors import (
    NUM_NEIGHBORS,
    ONE_RANK,
    TEMPERATURE,
    Ranks,
    TopK,
    exact_neighbors,
    retrieval_hits,
    vote,
)
from d2v_composer.system.progress import progress_bar

if TYPE_CHECKING:
    from d2v_composer.data.labeled import LabeledSet

Embed = Callable[[Tensor], Tensor | dict[str, Tensor]]
"""Embeds images: (B, 3, height, width) uint8 on the model's device → (B, D), or several embeddings by name."""
ModelT = TypeVar("ModelT", bound=Hashable)

EmbeddedSet = dict[str, dict[str, Tensor]]
"""Split ('train', 'test') → embedding → this rank's share, (share, D) float32 on the host."""


class Found(NamedTuple):
    """The neighbors of one split's images in the other split, with one embedding."""

    embedding: str
    """'' for a single one without a name."""
    bank: str
    """The split that was searched."""
    nearest: Tensor
    """(Q, K) int64: bank indices, nearest first."""
    hits: dict[Measure, Tensor]
    """k → (Q,) bool: whether any of the k nearest has the query's label; with bank 'train', also what a probe measures
    → (Q,) bool: whether it gives the query its label."""


def embed_set(
    embeds: Mapping[ModelT, Embed],
    labeled: "LabeledSet",
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
        for model, found in batches.items():
            # Popped, so that not all are held twice.
            embedded[model][split] = {name: torch.cat([each.pop(name) for each in found]) for name in list(found[0])}
    return embedded


def look_up(
    embedded: EmbeddedSet,
    labeled: "LabeledSet",
    ks: Sequence[int],
    to_device: Callable[[Tensor], Tensor],
    ranks: Ranks = ONE_RANK,
    probes: Collection[str] = (),
) -> Iterator[Found]:
    """Look up each split among the other, one embedding after the other; each rank takes its share of the queries.

    Args:
        embedded: One model's result of :func:`embed_set`; emptied, since all images in all embeddings take gigabytes.
        labeled: The labels.
        ks: The k to count hits for.
        to_device: Moves a tensor to the device that searches.
        ranks: As given to :func:`embed_set`.
        probes: Names of ``PROBES``, which classify the test images, too.
    """
    for name in list(embedded["train"]):
        labels = {split: to_device(getattr(labeled, split).labels) for split in BANKS}
        images = {split: ranks.gather(to_device(embedded[split].pop(name)), len(labels[split])) for split in BANKS}
        for bank, query in (BANKS, BANKS[::-1]):
            fitted = probes if bank == "train" else ()
            num_voters = min(NUM_NEIGHBORS, len(labels[bank])) if "knn" in fitted else 0
            neighbors = exact_neighbors(images[bank], ranks.take_share(images[query]), max(*ks, num_voters))
            nearest = ranks.gather(neighbors.indices[:, : max(ks)], len(labels[query]))
            hits: dict[Measure, Tensor] = {**retrieval_hits(nearest, labels[bank], labels[query], ks)}
            if num_voters:
                voters = TopK(*(each[:, :num_voters] for each in neighbors))
                for measure, temperature in {"knn": TEMPERATURE, "knn_majority": None}.items():
                    voted = ranks.gather(vote(voters, labels[bank], temperature), len(labels[query]))
                    hits[measure] = voted == labels[query]
            if "linear" in fitted:  # each rank fits it alone: a probe takes seconds
                probe = fit_linear_probe(images[bank], labels[bank])
                hits["linear"] = probe.predict(images[query]) == labels[query]
            yield Found(name, bank, nearest, hits)
