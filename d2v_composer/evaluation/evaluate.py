"""How good are representations? Retrieval with its uncertainty, class by class, and what the embedding costs.

Shapes: B images, N bank images, Q queries, C classes, D channels.
"""

import csv
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import one_hot
from tqdm.auto import tqdm

from d2v_composer.data.labelled_sets import LabelledImages, LabelledSet
from d2v_composer.evaluation.bootstrap import NUM_RESAMPLES, Interval, share_interval
from d2v_composer.evaluation.metric_names import BANKS, Embed, headline_fallbacks
from d2v_composer.evaluation.retrieval import nearest_neighbours, retrieval_hits
from d2v_composer.system.atomic_files import write_atomically

__all__ = ["OUT_FILES", "Candidate", "Evaluation", "Retrieval", "confusion_matrix", "evaluate"]

OUT_FILES = ("evaluation.json", "evaluation.csv")


class Candidate(NamedTuple):
    """What embeds images, and what it is made of."""

    name: str
    embed: Embed
    num_parameters: int
    gflop_per_image: float


class Retrieval(NamedTuple):
    """One candidate's result on one data set, one way, with one embedding."""

    candidate: str
    dataset: str
    bank: str
    embedding: str
    """'' where the candidate has but one."""
    hits: dict[int, NDArray[np.bool_]]
    """k → (Q,): whether any of the k nearest has the query's label."""
    confusion: NDArray[np.int64]
    """(C, C): queries of class i whose nearest bank image is of class j."""
    images_per_second: float

    def accuracy(self, k: int) -> Interval:
        """The share of hits; the percentile bootstrap of a share needs no resampling, but a binomial's draws."""
        hits = self.hits[k]
        draws = np.random.default_rng(0).binomial(len(hits), hits.mean(), size=NUM_RESAMPLES) / len(hits)
        low, high = np.percentile(draws, [2.5, 97.5])
        return Interval(float(hits.mean()), float(low), float(high))

    @property
    def class_accuracy(self) -> NDArray[np.float64]:
        """Top-1 of each class, (C,); NaN where it has no query."""
        with np.errstate(invalid="ignore"):
            return np.diag(self.confusion) / self.confusion.sum(axis=1)


class Evaluation(NamedTuple):
    """Everything that was measured."""

    candidates: list[Candidate]
    retrievals: list[Retrieval]
    ks: list[int]
    headline: str
    """The embedding that the tables show."""

    @property
    def headlines(self) -> list[Retrieval]:
        """Of each candidate the headline's results; the encoder has no layers, pixels have no choice."""
        shown = []
        for candidate in self.candidates:
            mine = [each for each in self.retrievals if each.candidate == candidate.name]
            names = {each.embedding for each in mine}
            wanted = next(name for name in (*headline_fallbacks(self.headline), "") if name in names)
            shown += [each for each in mine if each.embedding == wanted]
        return shown

    def find(self, candidate: str, dataset: str, bank: str) -> Retrieval | None:
        """A candidate's headline result."""
        wanted = (candidate, dataset, bank)
        return next((each for each in self.headlines if (each.candidate, each.dataset, each.bank) == wanted), None)

    def share_recovered(self, dataset: str, bank: str, k: int) -> Interval | None:
        """The part of the teacher's advantage over the untrained student that the student has.

        ``None``: the teacher has none, or one of the three is not there.
        """
        found = [self.find(name, dataset, bank) for name in ("untrained student", "student", "teacher")]
        hits = [each.hits[k] for each in found if each is not None]
        return share_interval(*hits) if len(hits) == 3 else None

    def rows(self) -> list[dict[str, str | int | float]]:
        """One for each candidate, data set, way, embedding and k."""
        return [
            {
                "candidate": each.candidate,
                "dataset": each.dataset,
                "bank": each.bank,
                "embedding": each.embedding,
                "k": k,
                **each.accuracy(k)._asdict(),
                "images_per_second": each.images_per_second,
            }
            for each in self.retrievals
            for k in self.ks
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "headline": self.headline,
            "results": self.rows(),
            "share_recovered": [
                {"dataset": dataset, "bank": bank, "k": k, **share._asdict()}
                for dataset in dict.fromkeys(each.dataset for each in self.retrievals)
                for bank in BANKS
                for k in self.ks
                if (share := self.share_recovered(dataset, bank, k)) is not None
            ],
            "confusion": [
                {
                    "candidate": each.candidate,
                    "dataset": each.dataset,
                    "bank": each.bank,
                    "matrix": each.confusion.tolist(),
                }
                for each in self.headlines
            ],
            "candidates": [
                {"name": name, "parameters": num_parameters, "gflop_per_image": gflop}
                for name, _, num_parameters, gflop in self.candidates
            ],
        }

    def write(self, folder: Path, about: dict[str, Any]) -> None:
        """``evaluation.json`` and ``evaluation.csv``, each there only once it is whole.

        Args:
            folder: It exists.
            about: What else belongs into the JSON.
        """
        table, rows = io.StringIO(newline=""), self.rows()
        writer = csv.DictWriter(table, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        as_json = json.dumps(about | self.as_json(), indent=1) + "\n"
        texts = dict(zip(OUT_FILES, (as_json, table.getvalue()), strict=True))
        for name, text in texts.items():
            write_atomically(folder / name, text)


def evaluate(
    candidates: Sequence[Candidate],
    datasets: Mapping[str, LabelledSet],
    ks: Sequence[int],
    device: str,
    batch_size: int,
    autocast_dtype: torch.dtype | None = None,
) -> Iterator[Retrieval]:
    """Embed every image once with each candidate, and look up each set's images among the other's.

    Args:
        candidates: On ``device``, in eval mode.
        datasets: Name → images; bank and queries by turns.
        ks: For which k a hit is looked for; each at most the smallest set's size.
        device: cpu or cuda.
        batch_size: Images embedded at once.
        autocast_dtype: What autocast computes in; default none.
    """
    for dataset, labelled in datasets.items():
        for candidate in candidates:
            start = time.perf_counter()
            with torch.inference_mode(), torch.autocast(device, autocast_dtype, enabled=autocast_dtype is not None):
                embedded = {
                    bank: embed_images(candidate, getattr(labelled, bank), device, batch_size, f"{dataset} {bank}")
                    for bank in BANKS
                }
            images_per_second = sum(labelled.num_images) / (time.perf_counter() - start)
            for bank, query in (BANKS, BANKS[::-1]):
                bank_labels, query_labels = (getattr(labelled, each).labels.to(device) for each in (bank, query))
                for name, queries in embedded[query].items():
                    nearest = nearest_neighbours(embedded[bank][name], queries, max(ks))
                    hits = retrieval_hits(nearest, bank_labels, query_labels, ks)
                    yield Retrieval(
                        candidate=candidate.name,
                        dataset=dataset,
                        bank=bank,
                        embedding=name,
                        hits={k: right.cpu().numpy() for k, right in hits.items()},
                        confusion=confusion_matrix(query_labels, bank_labels[nearest[:, 0]]),
                        images_per_second=images_per_second,
                    )


def embed_images(
    candidate: Candidate, images: LabelledImages, device: str, batch_size: int, label: str
) -> dict[str, Tensor]:
    """Each embedding by name, (N, D) float32 on the device."""
    parts: list[dict[str, Tensor]] = []
    for batch in tqdm(images.images.split(batch_size), desc=f"{candidate.name}: {label}", disable=None, leave=False):
        embeddings = candidate.embed(batch.to(device))
        embeddings = {"": embeddings} if isinstance(embeddings, Tensor) else embeddings
        parts.append({name: embedding.to(device).float() for name, embedding in embeddings.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def confusion_matrix(labels: Tensor, found: Tensor, num_classes: int = 0) -> NDArray[np.int64]:
    """How often queries of class i found class j, (C, C), C at least ``num_classes``."""
    num_classes = max(num_classes, int(torch.stack([labels, found]).max()) + 1)
    return (one_hot(labels, num_classes).double().T @ one_hot(found, num_classes).double()).long().cpu().numpy()
