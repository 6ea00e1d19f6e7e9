"""Embed a set of images, look up each split's images in the other split, and probe the embeddings.

Several ranks share the work. Shapes: B images of a batch, N of a split, Q queries, D channels.
"""

import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from d2v_composer.checkpoints.checkpoint import Measure, Result
from d2v_composer.data.modality import Augmentation, collate
from d2v_composer.evaluation.linear_probe import fit_linear_probe
from d2v_composer.evaluation.nearest_neighbors import (
    NUM_COMMON,
    NUM_NEIGHBORS,
    ONE_RANK,
    TEMPERATURE,
    Ranks,
    TopK,
    common_fractions,
    exact_neighbors,
    nearest_others,
    retrieval_hits,
    vote,
)
from d2v_composer.evaluation.rows import (
    AGREEMENT,
    BANKS,
    KNN,
    KNN_MAJORITY,
    LINEAR,
    TEACHER,
    VIEWS,
    Row,
    measures_of,
    retrieval_from,
)
from d2v_composer.models.names import EMBEDDING, find_primary
from d2v_composer.sources.labeled import EvaluationSet
from d2v_composer.system.errors import InputError
from d2v_composer.system.progress import progress_bar

Embed = Callable[..., Tensor | dict[str, Tensor]]
"""A function that embeds a batch on the model's device, and returns (B, D), or several embeddings by name.

A batch is images, (B, 3, height, width) uint8; or clips, (B, L) float32, and, only if some are padded, the number of
samples of each, (B,) int64, as a second argument.
"""

warn_once = cache(logging.getLogger(__name__).warning)
"""Logs a warning, unless the process has logged it before: a run measures its student many times."""
EmbeddedSet = dict[str, dict[str, Tensor]]
"""Part ('train', 'test', the ``VIEWS`` of test) → embedding → this rank's share, (share, D) float32 on the host."""
Neighbors = dict[str, dict[str, Tensor]]
LabeledVectors = tuple[Tensor, Tensor]
"""Embeddings, (N, D), and the label of each, (N,)."""


@dataclass
class Lookup:
    """Settings with which sets are embedded, looked up and probed, and results of the teacher that later calls use."""

    primary: str
    """Name of the primary embedding, whose results stand for a model."""
    ks: Sequence[int]
    """Numbers of neighbors to count hits among; each at most the size of the smallest split."""
    probes: Collection[str]
    """Names of ``PROBES``, further measures of the test images; a set without labels gets all that need no labels."""
    augment: Augmentation | None
    """Makes the two views of an image, for the probe ``instance``."""
    batch_size: int
    """Number of images that each rank embeds at once."""
    teacher_neighbors: Neighbors | None = None
    """Data set → embedding → the teacher's nearest others of each test image, (N, ``NUM_COMMON``) int32, filled in when
    the teacher is measured; ``None``: agreement is left out."""
    to_device: Callable[[Tensor], Tensor] = lambda tensor: tensor
    """Moves a tensor to the device that embeds and searches."""
    ranks: Ranks = ONE_RANK
    """The processes that share the work."""
    progress: str | None = None
    """Text of the progress bar before the name of the set; ``None``: no bar."""
    target: str = ""
    """Name of the teacher's embedding to which the student's embedding is fitted; '' without alignment."""
    teacher_embeddings: dict[str, EmbeddedSet] = field(default_factory=dict)
    """Data set → the teacher's embedding ``target``, kept from the first time that the teacher embeds the set."""

    def measures(self, labeled: EvaluationSet) -> list[Measure]:
        """Return the measures for a set: retrieval first, then the probes."""
        needs = {AGREEMENT.name: self.teacher_neighbors, "zero_shot": labeled.class_embeddings}
        measures = measures_of(self.ks, self.probes, labeled.has_labels)
        return [measure for measure in measures if needs.get(measure.name, labeled) is not None]

    def conditions(self, name: str, labeled: EvaluationSet) -> dict[str, str]:
        """Return dotted name → text, for everything that a set's numbers depend on besides the models."""
        measured, classes = {measure.name for measure in self.measures(labeled)}, labeled.class_embeddings
        conditions = {f"{name}.primary embedding": self.primary, f"{name}.images": labeled.fingerprint()}
        if "instance" in measured:
            conditions[f"{name}.augmented views"] = repr(self.augment)
        if "zero_shot" in measured and classes is not None:
            conditions[f"{name}.class_embeddings"] = hashlib.sha256(classes.numpy().data).hexdigest()
        return conditions

    def check(self, name: str, labeled: EvaluationSet) -> None:
        """Check that a set has enough images for every k.

        Raises:
            InputError: The set has too few images.
        """
        smallest, num_test, ks = min(filter(None, labeled.num_samples)), labeled.num_samples[1], self.ks
        if not 1 <= min(ks) <= max(ks) <= smallest:
            raise InputError(
                f"ks: must be from 1 to {smallest}, the number of images in {name}'s smaller split; got {list(ks)}"
            )
        if num_test <= NUM_COMMON and ("agreement" in self.probes or not labeled.has_labels):
            raise InputError(f"datasets.{name}: agreement needs more than {NUM_COMMON} images, got {num_test}")


def embed_set(
    embeds: Mapping[str, Embed], dataset: str, labeled: EvaluationSet, lookup: Lookup, with_views: bool
) -> dict[str, EmbeddedSet]:
    """Embed this rank's share of all parts with every model, in one pass over the samples.

    Clips of a similar length share a batch; the longest come first.

    Args:
        embeds: Name → model on the device.
        dataset: The set's name.
        labeled: The images.
        lookup: The settings.
        with_views: Embed two augmented views of each test image, too; they depend on the image's number alone.

    Returns:
        Name of a model → embeddings.
    """
    parts = ({"train": labeled.train} if labeled.has_labels else {}) | {"test": labeled.test}
    parts |= dict.fromkeys(VIEWS, labeled.test) if with_views else {}
    embedded: dict[str, EmbeddedSet] = {model: {part: {} for part in parts} for model in embeds}
    for part, (samples, _) in parts.items():
        mine = lookup.ranks.indices_of_rank(len(samples))
        sizes = torch.tensor([samples[i].shape[-1] for i in mine.tolist()])
        batches = sizes.argsort(descending=True, stable=True).split(lookup.batch_size)
        shown, is_hidden = f"{lookup.progress}{dataset} {part}", lookup.progress is None
        for places in progress_bar(batches, desc=shown, unit="batches", disable=is_hidden):
            numbers = mine[places].tolist()
            batch = [samples[i] for i in numbers]
            if lookup.augment is not None and part in VIEWS:
                batch = [lookup.augment(samples[i], i, VIEWS.index(part)) for i in numbers]
            inputs = move_batch(collate(batch), lookup.to_device)
            for model, embed in embeds.items():
                embeddings, of_part = embed(*inputs), embedded[model][part]
                for name, vectors in ({"": embeddings} if isinstance(embeddings, Tensor) else embeddings).items():
                    if name not in of_part:
                        of_part[name] = torch.empty(len(mine), vectors.shape[1])
                    of_part[name][places] = vectors.float().cpu()
    return embedded


def move_batch(batch: tuple[Tensor, ...], to_device: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Move a batch of :func:`collate` to a device: the samples by ``to_device``, then their lengths to the same."""
    values = to_device(batch[0])
    return [values, *(lengths.to(values.device) for lengths in batch[1:])]


def search(
    name: str, bank: LabeledVectors, queries: LabeledVectors, lookup: Lookup, wanted: Collection[str], warning: str
) -> tuple[dict[Measure, Tensor], Tensor]:
    """Look up queries in a bank; if the bank is the train split, also classify the queries by it.

    Args:
        name: Name of the bank.
        bank, queries: Embeddings and labels, on the device.
        lookup: The settings.
        wanted: Names of the measures.
        warning: The beginning of a warning; '' for none.

    Returns:
        Hits of each measure, (Q,), and indices of the queries' nearest in the bank, (Q, K).
    """
    ranks, (vectors, labels), (embeddings, expected) = lookup.ranks, bank, queries
    num_voters = NUM_NEIGHBORS if name == "train" and "knn" in wanted else 0
    nearest = exact_neighbors(vectors, ranks.rows_of_rank(embeddings), min(max(*lookup.ks, num_voters), len(labels)))
    indices = ranks.gather(nearest.indices[:, : max(lookup.ks)], len(expected))
    hits = {retrieval_from(name, k): hit for k, hit in retrieval_hits(indices, labels, expected, lookup.ks).items()}
    if num_voters:
        voters = TopK(*(tensor[:, :num_voters] for tensor in nearest))
        for measure, temperature in ((KNN, TEMPERATURE), (KNN_MAJORITY, None)):
            hits[measure] = ranks.gather(vote(voters, labels, temperature), len(expected)) == expected
    if name == "train" and "linear" in wanted:  # each rank fits it alone: a probe takes seconds
        probe = fit_linear_probe(vectors, labels)
        hits[LINEAR] = probe.predict(embeddings) == expected
        if warning and not probe.converged:
            warn_once(f"{warning}: the linear probe has not converged")
    return hits, indices


def measure_embeddings(
    rows: Sequence[Row], embeds: Mapping[str, Embed], dataset: str, labeled: EvaluationSet, lookup: Lookup
) -> Iterator[Result]:
    """Embed a set with every model, look up its images, and yield a result for each row, embedding and measure.

    Each rank takes its share of the queries. One embedding is looked up at a time, because all would take gigabytes on
    the device.

    Args:
        rows: The rows to measure. The teacher's need not be among them if it was measured before.
        embeds: Name → model on the device; models that no row names are left out.
        dataset: The set's name.
        labeled: The set.
        lookup: The settings.
    """
    wanted = {measure.name for measure in lookup.measures(labeled)}
    to_device, ranks, target = lookup.to_device, lookup.ranks, lookup.target
    teacher_embeddings = lookup.teacher_embeddings
    # Embed the set with each model; a teacher's embeddings that serve only as a bank, once in a run.
    needed = {row.queries for row in rows} | {row.bank for row in rows if dataset not in teacher_embeddings}
    used = {model: embed for model, embed in embeds.items() if model in needed}
    embedded = embed_set(used, dataset, labeled, lookup, "instance" in wanted)
    if TEACHER in used and target:
        teacher_embeddings[dataset] = {
            part: {target: embeddings[target]} for part, embeddings in embedded[TEACHER].items()
        }
    embedded = {TEACHER: teacher_embeddings.get(dataset, {})} | embedded
    # List what is searched: pairs of a bank and its queries.
    classes = labeled.class_embeddings if "zero_shot" in wanted else None
    labels = {split: to_device(getattr(labeled, split).labels) for split in BANKS}
    labels |= dict.fromkeys(VIEWS, torch.arange(len(labels["test"])).to(labels["test"]))
    searches = [VIEWS[::-1]] if "instance" in wanted else []
    searches += [BANKS, BANKS[::-1]] if labeled.has_labels else []
    searches += [] if classes is None else [("classes", "test")]

    def gathered(model: str, name: str) -> dict[str, LabeledVectors]:
        return {
            part: (ranks.gather(to_device(embeddings[name]), labeled.num_samples[part != "train"]), labels[part])
            for part, embeddings in embedded[model].items()
        }

    # For each row, choose its embeddings; for each embedding, find neighbors in common with the teacher, then search.
    for row in sorted(rows, key=lambda row: row.title != TEACHER):  # the teacher first: others are compared with it
        in_queries = embedded[row.queries]["test"]
        if row.is_projected:
            primary = target if row.queries == TEACHER else EMBEDDING
            names = {primary} & in_queries.keys()  # an untrained student's may be missing
        else:
            primary, has_projected_row = find_primary(lookup.primary, in_queries), target and row.changes_in_training
            names = [name for name in in_queries if name == primary or name != EMBEDDING or not has_projected_row]
        for name in names:
            queries = gathered(row.queries, name)
            banks = queries if row.bank == row.queries else gathered(row.bank, target)
            hits = dict[Measure, Tensor]()
            neighbors = dict[str, Tensor]()
            if (of_teacher := lookup.teacher_neighbors) is not None and "agreement" in wanted:
                nearest = nearest_others(queries["test"][0], ranks=ranks, bank=banks["test"][0])
                if row.title == TEACHER:
                    of_teacher.setdefault(dataset, {})[name] = nearest.int().cpu()
                theirs = of_teacher[dataset]
                same = name if name in theirs and name != primary else find_primary(lookup.primary, theirs)
                same = target if row.is_projected else same
                hits[AGREEMENT] = common_fractions(nearest, theirs[same])
            if name == EMBEDDING and classes is not None and classes.shape[1] == in_queries[name].shape[1]:
                banks = banks | {"classes": (to_device(classes), torch.arange(len(classes)).to(labels["test"]))}
            warning = f"{dataset}, {row.title}" if name == primary and ranks.rank == 0 else ""
            for bank, query in searches:
                if bank in banks:
                    hits_in_bank, indices = search(bank, banks[bank], queries[query], lookup, wanted, warning)
                    hits |= hits_in_bank
                    if name == primary and bank in BANKS:
                        neighbors[bank] = indices.int().cpu()
            for measure, hit in hits.items():
                is_primary = name == primary or measure.name == "zero_shot"
                yield Result(row.title, dataset, measure, name, is_primary, hit.cpu(), 0, neighbors.get(measure.bank))
