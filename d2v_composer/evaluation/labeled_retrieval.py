"""Embed a set of images, look up each split's images in the other split, and probe the embeddings.

Several ranks share the work. Shapes: B images of a batch, N of a split, Q queries, D channels.
"""

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from d2v_composer.data.modality import collate
from d2v_composer.evaluation.linear_probe import fit_linear_probe
from d2v_composer.evaluation.metrics import (
    AGREEMENT,
    BANKS,
    KNN,
    KNN_MAJORITY,
    LINEAR,
    PROBES,
    STUDENT,
    WITHOUT_LABELS,
    Measure,
    find_primary,
    instance_retrieval,
    retrieval_from,
)
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
from d2v_composer.models.names import PROJECTED
from d2v_composer.system.errors import InputError
from d2v_composer.system.progress import progress_bar

if TYPE_CHECKING:
    from d2v_composer.data.labeled import Augmentation, EvaluationSet

Embed = Callable[..., Tensor | dict[str, Tensor]]
"""Embeds a batch on the model's device → (B, D), or several embeddings by name.

A batch is images, (B, 3, height, width) uint8; or clips, (B, L) float32, and, only if some are padded, the number of
samples of each, (B,) int64, as a second argument.
"""

VIEWS = ("first view", "second view")
warn_once = cache(logging.getLogger(__name__).warning)
"""Logs a warning, unless the process has logged it before: a run measures its student many times."""
EmbeddedSet = dict[str, dict[str, Tensor]]
"""Part ('train', 'test', the ``VIEWS`` of test) → embedding → this rank's share, (share, D) float32 on the host."""
Neighbors = dict[str, dict[str, Tensor]]


@dataclass(eq=False)
class Candidate:
    """A model to compare with others, and what its last measurement found."""

    name: str
    """Its row in tables."""
    embed: Embed
    num_parameters: int = 0
    gflop: float = 0.0
    """For one input."""
    rates: dict[int, float] = field(default_factory=dict)
    """Batch size → inputs per second, if it was measured."""
    neighbors: Neighbors = field(default_factory=dict)
    """Data set → bank → the nearest bank images of each query in the primary embedding, (Q, K) int32."""
    nearest_others: Neighbors = field(default_factory=dict)
    """Data set → embedding → the nearest others of each test image, (N, ``NUM_COMMON``) int32."""


class Lookup(NamedTuple):
    """Settings of retrieval and probes."""

    primary: str
    """The embedding to report as a model's own."""
    ks: Sequence[int]
    """The k to count hits for; each at most the size of the smallest split."""
    probes: Collection[str]
    """Names of ``PROBES``, which judge the test images, too; without labels, all run that need none."""
    augment: "Augmentation | None"
    """Makes an image's views."""
    batch_size: int
    """Images embedded at once on each rank."""
    teacher: Candidate | None = None
    """What agreement compares with; ``None``: agreement is left out."""

    def measures(self, labeled: "EvaluationSet") -> list[Measure]:
        """Return the measures for a set: retrieval first, then the probes."""
        measures = [retrieval_from(bank, k) for bank in BANKS for k in self.ks if labeled.has_labels]
        for probe in map(PROBES.__getitem__, self.probes if labeled.has_labels else WITHOUT_LABELS):
            measures += map(probe, self.ks) if callable(probe) else probe
        needs = {AGREEMENT.name: self.teacher, "zero_shot": labeled.class_embeddings}
        return [each for each in measures if needs.get(each.name, labeled) is not None]

    def conditions(self, name: str, labeled: "EvaluationSet") -> dict[str, str]:
        """Return what the numbers of a set depend on, besides the models: its dotted name → what identifies it."""
        measured, classes = {measure.name for measure in self.measures(labeled)}, labeled.class_embeddings
        conditions = {f"{name}.primary embedding": self.primary, f"{name}.images": labeled.fingerprint()}
        if "instance" in measured:
            conditions[f"{name}.augmented views"] = repr(self.augment)
        if "zero_shot" in measured and classes is not None:
            conditions[f"{name}.class_embeddings"] = hashlib.sha256(classes.numpy().data).hexdigest()
        return conditions

    def check(self, name: str, labeled: "EvaluationSet") -> None:
        """Check that a set has enough images for every k.

        Raises:
            InputError: It has too few.
        """
        smallest, num_test, ks = min(filter(None, labeled.num_samples)), labeled.num_samples[1], self.ks
        if not 1 <= min(ks) <= max(ks) <= smallest:
            raise InputError(
                f"ks: must be from 1 to {smallest}, the number of images in {name}'s smaller split; got {list(ks)}"
            )
        if num_test <= NUM_COMMON and ("agreement" in self.probes or not labeled.has_labels):
            raise InputError(f"datasets.{name}: agreement needs more than {NUM_COMMON} images, got {num_test}")


class Result(NamedTuple):
    """One measure of one row's embedding on one data set."""

    row: str
    """The candidate's name."""
    dataset: str
    measure: Measure
    embedding: str
    """Name of the embedding; '' if it is the only one and has no name."""
    is_primary: bool
    """True for the candidate's primary embedding; ``zero_shot`` has but one."""
    hits: Tensor
    """For each query, on the host: (Q,) bool, or the share of common neighbors, (Q,) float64."""
    batch: int = 0
    """Batches after which a run measured it."""

    def plain(self) -> tuple[Any, ...]:
        """Return the fields as plain values, for a checkpoint."""
        return (*self[:2], tuple(self.measure), *self[3:])


def read_results(saved: Iterable[Any]) -> list[Result]:
    """Return the results whose :meth:`Result.plain` was saved."""
    return [Result(row, dataset, Measure(*measure), *others) for row, dataset, measure, *others in saved]


def last_batch(results: Iterable[Result]) -> int:
    """Return the batch after which a run last measured its student; 0 if it did not."""
    return max((result.batch for result in results if result.row == STUDENT), default=0)


def embed_set(
    candidates: Sequence[Candidate],
    labeled: "EvaluationSet",
    batch_size: int,
    to_device: Callable[[Tensor], Tensor],
    ranks: Ranks = ONE_RANK,
    progress: str | None = None,
    augment: "Augmentation | None" = None,
) -> dict[Candidate, EmbeddedSet]:
    """Embed this rank's share of all parts with every candidate, in one pass over the samples.

    Clips of a similar length share a batch; the longest come first.

    Args:
        candidates: Models on the device.
        labeled: The images.
        batch_size: Images embedded at once on each rank.
        to_device: Moves a tensor to the models' device.
        ranks: The processes that share the images.
        progress: The label of the progress bar; ``None``: no bar.
        augment: Makes two views of each test image, which depend on its number; ``None``: no views.
    """
    parts = ({"train": labeled.train} if labeled.has_labels else {}) | {"test": labeled.test}
    parts |= {} if augment is None else dict.fromkeys(VIEWS, labeled.test)
    embedded: dict[Candidate, EmbeddedSet] = {each: {part: {} for part in parts} for each in candidates}
    for part, (samples, _) in parts.items():
        share = ranks.share(len(samples))
        sizes = torch.tensor([samples[i].shape[-1] for i in share.tolist()])
        batches = sizes.argsort(descending=True, stable=True).split(batch_size)
        for places in progress_bar(batches, desc=f"{progress} {part}", unit="batches", disable=progress is None):
            numbers = share[places].tolist()
            batch = [samples[i] for i in numbers]
            if augment is not None and part in VIEWS:
                batch = [augment(samples[i], i, VIEWS.index(part)) for i in numbers]
            values, *others = collate(batch)
            values = to_device(values)
            inputs = [values, *(each.to(values.device) for each in others)]
            for candidate in candidates:
                embeddings, found = candidate.embed(*inputs), embedded[candidate][part]
                for name, each in ({"": embeddings} if isinstance(embeddings, Tensor) else embeddings).items():
                    if name not in found:
                        found[name] = torch.empty(len(share), each.shape[1])
                    found[name][places] = each.float().cpu()
    return embedded


def measure_embeddings(
    candidates: Sequence[Candidate],
    dataset: str,
    labeled: "EvaluationSet",
    lookup: Lookup,
    to_device: Callable[[Tensor], Tensor],
    ranks: Ranks = ONE_RANK,
    progress: str | None = None,
) -> Iterator[Result]:
    """Embed a set with every candidate; look up the test images among themselves, and each split in the other.

    Each rank takes its share of the queries. One embedding is looked up at a time: all take gigabytes.

    Args:
        candidates: Models on the device. The teacher need not be among them if it was measured before.
        dataset: The set's name.
        labeled: The set.
        lookup: How it is looked up.
        to_device: Moves a tensor to the device that embeds and searches.
        ranks: The processes that share the work.
        progress: The label of the progress bar; ``None``: no bar.
    """
    wanted, ks, teacher = {each.name for each in lookup.measures(labeled)}, lookup.ks, lookup.teacher
    views = lookup.augment if "instance" in wanted else None
    embedded = embed_set(candidates, labeled, lookup.batch_size, to_device, ranks, progress, views)
    labels = {split: to_device(getattr(labeled, split).labels) for split in BANKS}
    classes = labeled.class_embeddings if "zero_shot" in wanted else None
    labels["classes"] = torch.arange(0 if classes is None else len(classes)).to(labels["test"])
    for candidate in sorted(candidates, key=lambda each: each is not teacher):  # with which the others are compared
        parts = embedded[candidate]
        primary = find_primary(lookup.primary, parts["test"])
        for name in list(parts["test"]):
            images = {
                part: ranks.gather(to_device(shares.pop(name)), labeled.num_samples[part != "train"])
                for part, shares in parts.items()
            }
            hits: dict[Measure, Tensor] = {}
            if teacher is not None and "agreement" in wanted:
                nearest = nearest_others(images["test"], ranks=ranks)
                candidate.nearest_others.setdefault(dataset, {})[name] = nearest.int().cpu()
                known = teacher.nearest_others[dataset]
                is_own = name in known and name != primary
                hits[AGREEMENT] = common_shares(nearest, known[name if is_own else find_primary(lookup.primary, known)])
            if views is not None:
                found = instance_hits(*(images[view] for view in VIEWS), ks, ranks)
                hits |= {instance_retrieval(k): hit for k, hit in found.items()}
            searches = [BANKS, BANKS[::-1]] if labeled.has_labels else []
            if name == PROJECTED and classes is not None and classes.shape[1] == images["test"].shape[1]:
                images["classes"] = to_device(classes)
                searches.append(("classes", "test"))
            for bank, query in searches:
                fitted = wanted if bank == "train" else ()
                num_voters = min(NUM_NEIGHBORS, len(labels[bank])) if "knn" in fitted else 0
                most = min(max(*ks, num_voters), len(labels[bank]))
                nearest = exact_neighbors(images[bank], ranks.take_share(images[query]), most)
                indices = ranks.gather(nearest.indices[:, : max(ks)], len(labels[query]))
                if name == primary and bank in BANKS:
                    candidate.neighbors.setdefault(dataset, {})[bank] = indices.int().cpu()
                found = retrieval_hits(indices, labels[bank], labels[query], ks)
                hits |= {retrieval_from(bank, k): hit for k, hit in found.items()}
                if num_voters:
                    voters = TopK(*(each[:, :num_voters] for each in nearest))
                    for measure, temperature in ((KNN, TEMPERATURE), (KNN_MAJORITY, None)):
                        voted = ranks.gather(vote(voters, labels[bank], temperature), len(labels[query]))
                        hits[measure] = voted == labels[query]
                if "linear" in fitted:  # each rank fits it alone: a probe takes seconds
                    probe = fit_linear_probe(images[bank], labels[bank])
                    hits[LINEAR] = probe.predict(images[query]) == labels[query]
                    if probe.doubt and name == primary and ranks.rank == 0:
                        about = f"{dataset}, {candidate.name} ({name or 'only embedding'})"
                        warn_once(f"{about}: linear probe: {probe.doubt}")
            for measure, hit in hits.items():
                is_primary = name == primary or measure.name == "zero_shot"
                yield Result(candidate.name, dataset, measure, name, is_primary, hit.cpu())
