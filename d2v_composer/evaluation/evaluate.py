"""Evaluate embeddings: retrieval and probes with their uncertainty.

Shapes: Q queries.
"""

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from d2v_composer.data.labeled import Augmentation, EvaluationSet
from d2v_composer.data.modality import Modality
from d2v_composer.evaluation.labeled_retrieval import Candidate, Lookup, Result, measure_embeddings
from d2v_composer.evaluation.metrics import BANKS, GAP, ROWS, Log, Measure, metric_key, retrieval_from
from d2v_composer.models.backbone import Backbone
from d2v_composer.models.encoder import Encoder, Inputs, Tokens
from d2v_composer.models.layer_mean import LayerMean
from d2v_composer.models.precision import precision_of
from d2v_composer.system.addresses import hide_secrets
from d2v_composer.system.errors import InputError
from d2v_composer.system.files import check_out_file, write_atomically

NUM_RESAMPLES = 2000
GFLOP_PER_MAC = 2e-9
GAP_CLOSED = "teacher gap closed"
Groups = Mapping[Modality, Sequence[Candidate]]
"""Models on the device, in eval mode, by the samples that they take: images of one size."""
LoadSets = Callable[[Modality], tuple[Mapping[str, EvaluationSet], Augmentation]]
"""Returns name → samples, and what makes views of them."""


class Interval(NamedTuple):
    """An estimate with its 95 % percentile interval over resampled queries (Efron 1979)."""

    value: float
    low: float
    high: float
    note: str = ""
    """How many resamples are left out, in parentheses; '' for none."""


def accuracy_interval(hits: NDArray[np.bool_ | np.float64]) -> Interval:
    """Return the mean of the queries' hits (or fractions), (Q,), with its interval."""
    return Interval(float(hits.mean()), *np.percentile(resample(hits), [2.5, 97.5]).tolist())


def gap_closed_interval(*hits: NDArray[np.bool_ | np.float64]) -> Interval | None:
    """Return :func:`gap_closed` with its interval, from the three models' hits on the same queries, (Q,) each."""
    value, *resampled = (gap_closed(*each) for each in ([each.mean() for each in hits], *resample(*hits)))
    if value is None:
        return None
    low, high = np.percentile([each for each in resampled if each is not None], [2.5, 97.5]).tolist()
    without_gap = resampled.count(None)
    note = f" ({without_gap:,} of {NUM_RESAMPLES:,} resamples have no gap)" if without_gap else ""
    return Interval(value, low, high, note)


def gap_closed(untrained: float, student: float, teacher: float) -> float | None:
    """Return the teacher gap closed: the fraction of the gap from untrained student to teacher, 1 for all of it.

    ``None`` if the teacher is no better than the untrained student.
    """
    return None if teacher <= untrained else float((student - untrained) / (teacher - untrained))


def gap_closed_by_step(
    log: Log, dataset: str, embedding: str, k: int = 1, baselines: Log | None = None
) -> dict[int, float]:
    """Return step → teacher gap closed: the mean over both banks, or the value for the only bank with a gap.

    Args:
        log: Log of the student's run.
        dataset: Name of the labeled set.
        embedding: Embedding of student and teacher alike.
        k: The k of top-k.
        baselines: The log with the untrained student (``retrieval.at_start``) and the teacher
            (``retrieval.baselines``); default ``log``.

    Returns:
        Empty if either is missing, or there is no gap at all.
    """
    found: dict[int, list[float]] = {}
    for bank in BANKS:
        options = dataset, retrieval_from(bank, k), embedding
        untrained, _, teacher = ((baselines or log).get(metric_key(*options, row), {}) for row in GAP)
        for step, accuracy in log.get(metric_key(*options), {}).items() if 0 in untrained and teacher else ():
            closed = gap_closed(untrained[0], accuracy, teacher[max(teacher)])
            if closed is not None:
                found.setdefault(step, []).append(closed)
    return {step: mean(found[step]) for step in sorted(found)}


def resample(*hits: NDArray[np.bool_ | np.float64]) -> NDArray[np.float64]:
    """Return the accuracies of S candidates in each bootstrap resample of their common queries, (R, S).

    Queries that the same candidates get right are interchangeable, so that only the number of each such kind is drawn.

    Args:
        hits: Hits of each candidate, (Q,) each.
    """
    kinds, counts = np.unique(np.stack(hits, axis=1), axis=0, return_counts=True)
    num_queries = counts.sum()
    drawn = np.random.default_rng(0).multinomial(num_queries, counts / num_queries, size=NUM_RESAMPLES)
    return drawn @ kinds / num_queries


def cost(model: Backbone | Encoder) -> dict[str, Any]:
    """Return a model's number of parameters, and its GFLOP for one input, both with its encoder."""
    gflop = GFLOP_PER_MAC * sum(part.forward_macs() for part in {model, getattr(model, "encoder", model)})
    return {"num_parameters": sum(map(torch.numel, model.parameters())), "gflop": gflop}


def build_candidates(
    first: Backbone, models: Mapping[str, Backbone], layer_mean: LayerMean, fill_to: int = 0
) -> list[Candidate]:
    """Return the candidates: pixels or spectrum, ``encoder`` (its output in every pooling), then each model.

    A tensor that is passed again, to another of them, is not encoded again: autocast must be the same for all. The
    encoder's output lives as long as its inputs.

    Args:
        first: The model on the encoder that is compared.
        models: Name → model.
        layer_mean: How ``layer_mean`` of all models is computed.
        fill_to: Fill up smaller batches to this size, because a compiled model needs a graph for each size.
    """
    encoder, encoded = first.encoder, WeakIdKeyDictionary()

    def encode(own: Encoder, inputs: Inputs) -> Tokens:
        known: Any = encoded.setdefault(inputs.values, {})
        if own not in known:
            batch = inputs.filled_up(fill_to - len(inputs.values)) if fill_to else inputs
            known[own] = own(own.windows(batch))
        return known[own]

    def pool(tokens: Tokens) -> dict[str, Tensor]:
        return first.features(tokens).poolings(tokens.x, "output_")

    def candidate(name: str, model: Backbone | Encoder, own: Encoder, embed: Callable[..., Any]) -> Candidate:
        def embed_inputs(*inputs: Tensor) -> dict[str, Tensor]:
            found = embed(encode(own, Inputs(*inputs)))
            return {name: each[: len(inputs[0])] for name, each in found.items()}

        return Candidate(name, embed_inputs, **cost(model))

    return [
        Candidate(encoder.baseline, lambda *inputs: encoder.raw(Inputs(*inputs))),
        # Not if the encoder is all of the model.
        *([candidate("encoder", encoder, encoder, pool)] if first.block_list else []),
        *(
            candidate(name, each, each.encoder, partial(each.embed_encoded, layer_mean=layer_mean))
            for name, each in models.items()
        ),
    ]


def pivot(results: Iterable[Result], dataset: str) -> dict[Measure, dict[str, Interval | None]]:
    """Return measure → row → accuracy on a data set, in each model's primary embedding; other rows follow ``ROWS``.

    The teacher gap closed, in the last row, :data:`GAP_CLOSED`, is ``None`` if there is no gap; it is missing if one of
    the three models is.
    """
    columns: dict[Measure, dict[str, NDArray[Any]]] = {}
    for result in sorted(results, key=lambda result: (*ROWS, result.row).index(result.row)):
        if result.dataset == dataset and result.is_primary:
            columns.setdefault(result.measure, {})[result.row] = result.hits.numpy()
    return {
        measure: {row: accuracy_interval(hits) for row, hits in rows.items()}
        | ({GAP_CLOSED: gap_closed_interval(*(rows[row] for row in GAP))} if rows.keys() >= {*GAP} else {})
        for measure, rows in columns.items()
    }


class Evaluation(NamedTuple):
    """All results of an evaluation."""

    candidates: list[Candidate]
    lookup: Lookup
    class_names: dict[str, Sequence[str]]
    """Data set → the name of each label; empty if the labels are only numbers."""
    results: list[Result]

    def write(self, folder: Path, about: dict[str, Any]) -> None:
        """Write ``evaluation.json``, with further entries but no secrets, and ``evaluation.csv``, each atomically.

        Both have a row for each candidate, data set, bank, embedding and k or probe.
        """

        def cell(dataset: str, measure: Measure, interval: Interval) -> dict[str, Any]:
            place = {"dataset": dataset, "bank": measure.bank, "measure": measure.name, "k": measure.k}
            return place | interval._asdict()

        rows = [
            {"candidate": row, "embedding": embedding, **cell(dataset, measure, accuracy_interval(hits.numpy()))}
            for row, dataset, measure, embedding, _, hits, _ in self.results
        ]
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        found = {
            "primary": self.lookup.primary,
            "class_names": self.class_names,
            "results": rows,
            "teacher_gap_closed": [
                cell(dataset, measure, closed)
                for dataset in self.class_names
                for measure, cells in pivot(self.results, dataset).items()
                if (closed := cells.get(GAP_CLOSED)) is not None
            ],
            "candidates": [
                {
                    "name": each.name,
                    "parameters": each.num_parameters,
                    "gflop_per_image": each.gflop,
                    "per_second": each.rates,
                }
                for each in self.candidates
            ],
        }
        write_atomically(folder / "evaluation.json", json.dumps(hide_secrets(about) | found, indent=1) + "\n")
        write_atomically(folder / "evaluation.csv", table.getvalue())


def read_evaluation(folder: Path, weights: str) -> dict[str, Any]:
    """Return the contents of a folder's ``evaluation.json``; empty if it is not of a model with these weights."""
    with suppress(Exception):
        found = json.loads((folder / "evaluation.json").read_bytes())
        if found["weights"] == weights:
            return found
    return {}


def check_out(folder: Path, weights: str) -> None:
    """Check, before the work starts, that results can be written and replace only results of the same weights.

    Raises:
        InputError: A file cannot be written, or has the results of other weights.
    """
    for path in (folder / f"evaluation.{suffix}" for suffix in ("json", "csv", "png")):
        check_out_file(path)
        if os.path.lexists(path) and not read_evaluation(folder, weights):
            raise InputError(f"out: {path} has the results of other weights; remove it, or choose another folder")


def evaluate(
    groups: Groups,
    lookup: Lookup,
    load: LoadSets,
    device: str,
    autocast_dtype: torch.dtype | None = None,
) -> Evaluation:
    """Embed every image once per candidate, look up each split's images in the other split, and run the probes.

    Args:
        groups: Models on ``device``.
        lookup: How each set is looked up, without ``augment``.
        load: Loads the sets for a group.
        device: cpu or cuda.
        autocast_dtype: Enables autocast with this dtype.
    """
    evaluation, move = Evaluation([], lookup, {}, []), partial(torch.Tensor.to, device=device)
    for modality, candidates in groups.items():
        (datasets, augment), names = load(modality), ", ".join(each.name for each in candidates)
        evaluation.candidates.extend(candidates)
        for dataset, labeled in datasets.items():
            evaluation.class_names[dataset] = labeled.class_names
            print(f"embedding {sum(labeled.num_samples):,} samples of {dataset}: {names}", file=sys.stderr)
            options = lookup._replace(augment=augment), move
            with torch.inference_mode(), precision_of(autocast_dtype, device):
                evaluation.results.extend(measure_embeddings(candidates, dataset, labeled, *options, progress=dataset))
    return evaluation
