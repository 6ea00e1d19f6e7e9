"""Embed a set of images, look up each split's images in the other split, and probe the embeddings.

Several ranks share the work. Shapes: B images of a batch, N of a split, Q queries, D channels.
"""

import logging
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from d2v_composer.data.modality import collate
from d2v_composer.evaluation.linear_probe import fit_linear_probe
from d2v_composer.evaluation.metrics import AGREEMENT, BANKS, PROBES, WITHOUT_LABELS, Measure, find_primary
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
from d2v_composer.evaluation.without_labels import NUM_COMMON, common_shares, instance_hits, nearest_others
from d2v_composer.system.errors import InputError
from d2v_composer.system.progress import progress_bar

if TYPE_CHECKING:
    from d2v_composer.data.labeled import Augmentation, LabeledSet

Embed = Callable[..., Tensor | dict[str, Tensor]]
"""Embeds a batch on the model's device → (B, D), or several embeddings by name.

A batch is images, (B, 3, height, width) uint8; or clips, (B, L) float32, and, only if some are padded, the number of
samples of each, (B,) int64, as a second argument.
"""
ModelT = TypeVar("ModelT", bound=Hashable)

VIEWS = ("first view", "second view")
warn_once = cache(logging.getLogger(__name__).warning)
"""Logs a warning, unless the process has logged it before: a run measures its student many times."""
EmbeddedSet = dict[str, dict[str, Tensor]]
"""Part ('train', 'test', the ``VIEWS`` of test) → embedding → this rank's share, (share, D) float32 on the host."""


class Found(NamedTuple):
    """The neighbors of one split's images in the other split, or of the test images among themselves."""

    embedding: str
    """Name of the embedding; '' if it is the only one and has no name."""
    is_primary: bool
    """True for the model's primary embedding."""
    bank: str
    """The split that was searched; '' for the test images among themselves."""
    nearest: Tensor
    """(Q, K) int64: bank indices, nearest first; within the test images, only if agreement is measured."""
    hits: dict[Measure, Tensor]
    """k → (Q,) bool: whether any of the k nearest has the query's label; with bank 'train', also what a probe measures
    → (Q,) bool: whether it gives the query its label. With bank '', what needs no labels → the share of common
    neighbors, (Q,) float64, or whether the other view is among the k nearest, (Q,) bool."""


def embed_set(
    embeds: Mapping[ModelT, Embed],
    labeled: "LabeledSet",
    batch_size: int,
    to_device: Callable[[Tensor], Tensor],
    ranks: Ranks = ONE_RANK,
    progress: str | None = None,
    augment: "Augmentation | None" = None,
) -> dict[ModelT, EmbeddedSet]:
    """Embed this rank's share of all parts with every model, in one pass over the samples.

    Clips of a similar length share a batch; the longest come first.

    Args:
        embeds: Model → embed function.
        labeled: The images.
        batch_size: Images embedded at once on each rank.
        to_device: Moves a tensor to the model's device.
        ranks: The processes that share the images.
        progress: The label of the progress bar; ``None``: no bar.
        augment: Makes two views of each test image, which depend on its number; ``None``: no views.
    """
    embedded: dict[ModelT, EmbeddedSet] = {model: {} for model in embeds}
    parts = ({"train": labeled.train} if labeled.has_labels else {}) | {"test": labeled.test}
    parts |= {} if augment is None else dict.fromkeys(VIEWS, labeled.test)
    for part, (samples, _) in parts.items():
        batches: dict[ModelT, list[dict[str, Tensor]]] = {model: [] for model in embeds}
        share = ranks.share(len(samples))
        sizes = torch.tensor([samples[i].shape[-1] for i in share.tolist()])
        order = sizes.argsort(descending=True, stable=True)
        shares = share[order].split(batch_size)
        for indices in progress_bar(shares, desc=f"{progress} {part}", unit="batches", disable=progress is None):
            batch = [samples[i] for i in indices.tolist()]
            if augment is not None and part in VIEWS:
                view = VIEWS.index(part)
                batch = [augment(sample, i, view) for i, sample in zip(indices.tolist(), batch, strict=True)]
            values, *others = collate(batch)
            values = to_device(values)
            inputs = [values, *(each.to(values.device) for each in others)]
            for model, embed in embeds.items():
                embeddings = embed(*inputs)
                embeddings = {"": embeddings} if isinstance(embeddings, Tensor) else embeddings
                batches[model].append({name: each.float().cpu() for name, each in embeddings.items()})
        for model, found in batches.items():
            # Popped, so that not all are held twice.
            names, back = list(found[0]), order.argsort()
            embedded[model][part] = {name: torch.cat([each.pop(name) for each in found])[back] for name in names}
    return embedded


def probes_on(labeled: "LabeledSet", probes: Collection[str], *, has_teacher: bool) -> list[str]:
    """Return the probes to run on a set; without labels, all probes that need none."""
    wanted = probes if labeled.has_labels else WITHOUT_LABELS
    return [probe for probe in wanted if has_teacher or probe != "agreement"]


def check_size(name: str, labeled: "LabeledSet", ks: Sequence[int], probes: Collection[str]) -> None:
    """Check that a set has enough images to look up.

    Raises:
        InputError: It has too few.
    """
    smallest, num_test = min(filter(None, labeled.num_samples)), labeled.num_samples[1]
    if not 1 <= min(ks) <= max(ks) <= smallest:
        raise InputError(
            f"ks: must be from 1 to {smallest}, the number of images in {name}'s smaller split; got {list(ks)}"
        )
    if num_test <= NUM_COMMON and ("agreement" in probes or not labeled.has_labels):
        raise InputError(f"datasets.{name}: agreement needs more than {NUM_COMMON} images, got {num_test}")


def look_up(
    embedded: Mapping[ModelT, EmbeddedSet],
    labeled: "LabeledSet",
    primary: str,
    ks: Sequence[int],
    to_device: Callable[[Tensor], Tensor],
    ranks: Ranks = ONE_RANK,
    probes: Collection[str] = (),
    *,
    dataset: str,
    teachers: dict[str, Tensor],
) -> Iterator[tuple[ModelT, Found]]:
    """Look up the test images among themselves, and each split in the other, one embedding at a time.

    Each rank takes its share of the queries.

    Args:
        embedded: Model → result of :func:`embed_set`; emptied, since all images in all embeddings take gigabytes.
        labeled: The labels, if there are any.
        primary: The primary embedding; the model ``None`` must have it, another may have a fallback for it.
        ks: The k to count hits for.
        to_device: Moves a tensor to the device that searches.
        ranks: As given to :func:`embed_set`.
        probes: Names of ``PROBES``, which judge the test images, too; agreement needs the model 'teacher', here or
            before.
        dataset: The set's name, for warnings.
        teachers: Embedding of the teacher, '' the primary one → the neighbors of each test image, (N, K) int32; filled
            if 'teacher' is among the models, and read for all.
    """
    for model in sorted(embedded, key=lambda model: model != "teacher"):  # with which the others are compared
        parts = embedded[model]
        main = find_primary(primary, parts["test"], fall_back=model is not None)
        for name in list(parts["test"]):
            images = {
                part: ranks.gather(to_device(shares.pop(name)), labeled.num_samples[part != "train"])
                for part, shares in parts.items()
            }
            nearest = images["test"].new_empty(0)
            hits: dict[Measure, Tensor] = {}
            if "agreement" in probes:
                nearest = nearest_others(images["test"], ranks=ranks)
                if model == "teacher":
                    teachers |= dict.fromkeys(["", name] if name == main else [name], nearest.int().cpu())
                hits[AGREEMENT] = common_shares(nearest, teachers["" if name == main or name not in teachers else name])
            if "instance" in probes:
                first, second = (images[view] for view in VIEWS)
                hits |= {f"instance/top{k}": hit for k, hit in instance_hits(first, second, ks, ranks).items()}
            if hits:
                yield model, Found(name, name == main, "", nearest, hits)
            if not labeled.has_labels:
                continue
            labels = {split: to_device(getattr(labeled, split).labels) for split in BANKS}
            for bank, query in (BANKS, BANKS[::-1]):
                fitted = probes if bank == "train" else ()
                num_voters = min(NUM_NEIGHBORS, len(labels[bank])) if "knn" in fitted else 0
                neighbors = exact_neighbors(images[bank], ranks.take_share(images[query]), max(*ks, num_voters))
                nearest = ranks.gather(neighbors.indices[:, : max(ks)], len(labels[query]))
                hits = {**retrieval_hits(nearest, labels[bank], labels[query], ks)}
                if num_voters:
                    voters = TopK(*(each[:, :num_voters] for each in neighbors))
                    for measure, temperature in zip(PROBES["knn"], (TEMPERATURE, None), strict=True):
                        voted = ranks.gather(vote(voters, labels[bank], temperature), len(labels[query]))
                        hits[measure] = voted == labels[query]
                if "linear" in fitted:  # each rank fits it alone: a probe takes seconds
                    about = f"{dataset}, {model or 'student'} ({name or 'only embedding'}): %s"
                    warn = partial(warn_once, about) if name == main and ranks.rank == 0 else bool
                    probe = fit_linear_probe(images[bank], labels[bank], warn=warn)
                    hits["linear/top1"] = probe.predict(images[query]) == labels[query]
                yield model, Found(name, name == main, bank, nearest, hits)
