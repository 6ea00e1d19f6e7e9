"""Evaluate embeddings: retrieval and probes with their uncertainty, class by class, and the cost of embedding.

Shapes: Q queries, C classes.
"""

import csv
import io
import json
import logging
import math
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v_composer.data.labelled_sets import LabelledSet
from d2v_composer.evaluation.bootstrap import Interval, accuracy_interval, share_interval
from d2v_composer.evaluation.embed_function import Embed
from d2v_composer.evaluation.knn import NUM_NEIGHBOURS
from d2v_composer.evaluation.labelled_retrieval import embed_set, look_up
from d2v_composer.evaluation.metric_names import Measure, find_headline
from d2v_composer.system.atomic_files import write_atomically

__all__ = ["OUT_FILES", "Candidate", "Evaluation", "Retrieval", "confusion_matrix", "evaluate"]

OUT_FILES = ("evaluation.json", "evaluation.csv")
SPEED_BATCHES = 3  # the first one also warms up

log = logging.getLogger(__name__)


class Candidate(NamedTuple):
    """A model to compare."""

    name: str
    embed: Embed
    num_parameters: int
    gflop_per_image: float


class Retrieval(NamedTuple):
    """The result of one candidate on one data set, in one direction, with one embedding."""

    candidate: str
    dataset: str
    bank: str
    embedding: str
    """'' for a candidate with only one."""
    hits: dict[Measure, NDArray[np.bool_]]
    """k → (Q,): whether any of the k nearest has the query's label; with bank 'train', also what a probe measures."""
    confusion: NDArray[np.int64]
    """(C, C): queries of class i whose nearest bank image is of class j."""
    images_per_second: float
    strength: float | None = None
    """Of the linear probe's L2 penalty, if there is a linear probe."""

    def accuracy(self, measure: Measure) -> Interval:
        return accuracy_interval(self.hits[measure])

    @property
    def class_accuracy(self) -> NDArray[np.float64]:
        """Top-1 of each class, (C,); NaN for a class without queries."""
        with np.errstate(invalid="ignore"):
            return np.diag(self.confusion) / self.confusion.sum(axis=1)


class Evaluation(NamedTuple):
    """All results."""

    candidates: list[Candidate]
    retrievals: list[Retrieval]
    ks: list[int]
    headline: str
    """The embedding that the tables show."""
    class_names: Mapping[str, Sequence[str]]
    """Data set → the name of each label; empty if the labels are only numbers."""

    @property
    def datasets(self) -> list[str]:
        return list(dict.fromkeys(each.dataset for each in self.retrievals))

    @property
    def measures(self) -> list[tuple[str, Measure]]:
        """All pairs of bank and what was measured with it."""
        return list(dict.fromkeys((each.bank, measure) for each in self.retrievals for measure in each.hits))

    @property
    def headlines(self) -> dict[tuple[str, str, str], Retrieval]:
        """Candidate, data set and bank → its result with the headline embedding, or with the fallback for it."""
        names: dict[str, set[str]] = {}
        for each in self.retrievals:
            names.setdefault(each.candidate, set()).add(each.embedding)
        shown = {candidate: find_headline(self.headline, found, fall_back=True) for candidate, found in names.items()}
        return {
            (each.candidate, each.dataset, each.bank): each
            for each in self.retrievals
            if each.embedding == shown[each.candidate]
        }

    def share_recovered(self, dataset: str, bank: str, measure: Measure) -> Interval | None:
        """Return the part of the teacher's advantage over the untrained student that the student has.

        ``None``: the teacher has no advantage, or one of the three was not evaluated.
        """
        headlines = self.headlines
        keys = [(name, dataset, bank) for name in ("untrained student", "student", "teacher")]
        if not all(key in headlines for key in keys):
            return None
        return share_interval(*(headlines[key].hits[measure] for key in keys))

    def class_name(self, dataset: str, label: int) -> str:
        """Return a label's name; the number if it has none."""
        names = self.class_names[dataset]
        return names[label] if label < len(names) else str(label)

    def rows(self) -> list[dict[str, str | int | float | None]]:
        """Return one row for each candidate, data set, bank, embedding and k, or probe."""
        return [
            {
                "candidate": each.candidate,
                "dataset": each.dataset,
                "bank": each.bank,
                "embedding": each.embedding,
                **describe_measure(measure),
                **each.accuracy(measure)._asdict(),
                "images_per_second": each.images_per_second,
                "strength": each.strength if measure == "linear" else None,
            }
            for each in self.retrievals
            for measure in each.hits
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "headline": self.headline,
            "class_names": {dataset: list(names) for dataset, names in self.class_names.items()},
            "results": self.rows(),
            "share_recovered": [
                {"dataset": dataset, "bank": bank, **describe_measure(measure), **share._asdict()}
                for dataset in self.datasets
                for bank, measure in self.measures
                if (share := self.share_recovered(dataset, bank, measure)) is not None
            ],
            "confusion": [
                {"candidate": candidate, "dataset": dataset, "bank": bank, "matrix": each.confusion.tolist()}
                for (candidate, dataset, bank), each in self.headlines.items()
            ],
            "candidates": [
                {"name": name, "parameters": num_parameters, "gflop_per_image": gflop}
                for name, _, num_parameters, gflop in self.candidates
            ],
        }

    def write(self, folder: Path, about: dict[str, Any]) -> None:
        """Write ``evaluation.json`` and ``evaluation.csv``, each atomically.

        Args:
            folder: An existing folder.
            about: Further entries of the JSON.
        """
        table, rows = io.StringIO(newline=""), self.rows()
        writer = csv.DictWriter(table, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        as_json = json.dumps(about | self.as_json(), indent=1) + "\n"
        for name, text in zip(OUT_FILES, (as_json, table.getvalue()), strict=True):
            write_atomically(folder / name, text)


def describe_measure(measure: Measure) -> dict[str, str | int | None]:
    """Return the cells of a measure: 'retrieval' among the k nearest, or the probe and the number of its voters."""
    if isinstance(measure, int):
        return {"measure": "retrieval", "k": measure}
    return {"measure": measure, "k": None if measure == "linear" else NUM_NEIGHBOURS}


def evaluate(
    candidates: Sequence[Candidate],
    datasets: Mapping[str, LabelledSet],
    ks: Sequence[int],
    device: str,
    batch_size: int,
    autocast_dtype: torch.dtype | None = None,
    probes: Collection[str] = (),
) -> Iterator[Retrieval]:
    """Embed every image once, with all candidates, look up each split's images among the other's, and probe them.

    Args:
        candidates: On ``device``, in eval mode.
        datasets: Name → images.
        ks: The k to count hits for; each at most the size of the smallest split.
        device: cpu or cuda.
        batch_size: Images embedded at once.
        autocast_dtype: Enables autocast with this dtype.
        probes: Names of ``PROBES``.
    """
    embeds = {candidate.name: candidate.embed for candidate in candidates}
    for dataset, labelled in datasets.items():
        print(f"embedding {sum(labelled.num_images):,} images of {dataset}: {', '.join(embeds)}", file=sys.stderr)
        with torch.inference_mode(), torch.autocast(device, autocast_dtype, enabled=autocast_dtype is not None):
            to_device = partial(torch.Tensor.to, device=device)
            speeds = {name: measure_speed(embed, labelled, batch_size, device) for name, embed in embeds.items()}
            embedded = embed_set(embeds, labelled, batch_size, to_device, progress=dataset)
        for name, of_candidate in embedded.items():
            for found in look_up(of_candidate, labelled, ks, to_device, probes=probes):
                if found.linear is not None and found.linear.doubt is not None:
                    log.warning("linear probe of %s on %s, %s: %s", name, dataset, found.embedding, found.linear.doubt)
                query = "test" if found.bank == "train" else "train"
                labels, bank_labels = (getattr(labelled, split).labels for split in (query, found.bank))
                yield Retrieval(
                    candidate=name,
                    dataset=dataset,
                    bank=found.bank,
                    embedding=found.embedding,
                    hits={measure: hits.cpu().numpy() for measure, hits in found.hits.items()},
                    confusion=confusion_matrix(labels, bank_labels[found.nearest[:, 0].cpu()]),
                    images_per_second=speeds[name],
                    strength=None if found.linear is None else found.linear.strength,
                )


def measure_speed(embed: Embed, labelled: LabelledSet, batch_size: int, device: str) -> float:
    """Return the images per second that a model embeds from the host, its encoder included: the best of a few batches.

    A pass over all images cannot tell: models share the encoder there.
    """
    fastest = math.inf
    for _ in range(SPEED_BATCHES):
        start = time.perf_counter()
        # A new tensor in each round: equal images must be encoded again.
        embeddings = embed(labelled.train.images[:batch_size].to(device, copy=True))
        each = embeddings if isinstance(embeddings, Tensor) else next(iter(embeddings.values()))
        each.cpu()  # waits for the device
        fastest = min(fastest, time.perf_counter() - start)
    return len(labelled.train.images[:batch_size]) / fastest


def confusion_matrix(labels: Tensor, found: Tensor, num_classes: int = 0) -> NDArray[np.int64]:
    """Count how often queries of class i found class j, (C, C), C at least ``num_classes``."""
    num_classes = max(num_classes, int(torch.stack([labels, found]).max()) + 1)
    counts = torch.bincount(labels * num_classes + found, minlength=num_classes**2)
    return counts.view(num_classes, num_classes).numpy()
