"""Compare models on evaluation sets, and write the results."""

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from d2v_composer.data.modality import Augmentation, Modality
from d2v_composer.evaluation.embedded_set import Embed, check_finite, embed_set
from d2v_composer.evaluation.measurement import measure
from d2v_composer.evaluation.metrics.metric import Column
from d2v_composer.evaluation.results import Interval, Result, gap_closed, pivot
from d2v_composer.evaluation.rows import rows_of
from d2v_composer.evaluation.settings import Settings
from d2v_composer.models.alignment import EmbeddingInfo
from d2v_composer.models.backbone import Backbone
from d2v_composer.models.encoder import Encoder, Inputs
from d2v_composer.models.precision import precision_of
from d2v_composer.models.targets import LayerMean
from d2v_composer.sources.labeled import EvaluationSet
from d2v_composer.system.addresses import hide_secrets
from d2v_composer.system.errors import InputError
from d2v_composer.system.files import check_out_file, write_atomically


def cost(model: Backbone | Encoder | None, fitted_width: int = 0) -> dict[str, Any]:
    """Return a dict with ``num_parameters``, buffers included, and ``gflop`` for one image or 5-s clip.

    Args:
        model: The model; ``None``: ``num_parameters`` and ``gflop`` are 0.
        fitted_width: Number of outputs of the linear alignment that the model will get later, counted in; 0: none.
    """
    if model is None:
        return {"num_parameters": 0, "gflop": 0.0}
    inputs = sum(map(model.width_of, model.alignment_inputs)) if isinstance(model, Backbone) else 0
    return {
        "num_parameters": sum(map(torch.numel, model.state_dict().values())) + fitted_width * (inputs + 1),
        "gflop": (model.flop() + 2 * fitted_width * inputs) / 1e9,
    }


def share_encoders(
    first: Backbone, models: Mapping[str, Backbone], layer_mean: LayerMean, fill_to: int = 0
) -> dict[str, Embed]:
    """Return name → function that embeds a batch, for the models and for the baselines.

    A shared encoder runs once for each batch, so call all functions under the same autocast.

    Args:
        first: The model whose input and encoder are the baselines; a model without blocks after the encoder has only
            the input as a baseline.
        models: Name → model.
        layer_mean: Settings of all models' ``layer_mean`` embeddings, the means of the blocks' normalized FFN outputs.
        fill_to: Number of samples to which smaller batches are filled up; 0: batches keep their size.
    """
    encoded = WeakIdKeyDictionary()

    def embed(encoder: Encoder, read: Callable[..., dict[str, Tensor]], *inputs: Tensor) -> dict[str, Tensor]:
        known: Any = encoded.setdefault(inputs[0], {})
        if encoder not in known:
            batch = Inputs(*inputs)
            batch = batch.filled_up(fill_to - len(inputs[0])) if fill_to else batch
            known[encoder] = encoder(encoder.windows(batch))
        return {name: embedding[: len(inputs[0])] for name, embedding in read(known[encoder]).items()}

    encoder = first.encoder
    embeds: dict[str, Embed] = {encoder.baseline: lambda *inputs: encoder.baseline_of(Inputs(*inputs))}
    if first.block_list:  # else the encoder is all of the model
        embeds["encoder"] = partial(embed, encoder, lambda tokens: first.features(tokens).poolings(tokens.x, "output_"))
    for name, model in models.items():
        embeds[name] = partial(embed, model.encoder, partial(model.embed_encoded, layer_mean=layer_mean))
    return embeds


@dataclass
class Evaluation:
    """Models to compare, and their results."""

    groups: Mapping[Modality, dict[str, Embed]]
    """Modality → name of a model of this modality → function that embeds a batch."""
    costs: Mapping[str, dict[str, Any]]
    """Name of a model → result of :func:`cost`."""
    settings: Settings
    """Settings of the evaluation, in which :meth:`run` replaces ``augment``, ``to_device`` and ``progress``."""
    infos: Mapping[str, EmbeddingInfo]
    """Name of a model → description of the model's embedding, if known."""
    weights: Mapping[str, str]
    """Name of a model → hash of the model's weights, if known."""
    load: Callable[[Modality], tuple[Mapping[str, EvaluationSet], Augmentation]]
    """Returns, for a modality, the data sets by name, and the augmentation that makes the samples' views."""
    datasets: dict[str, EvaluationSet] = field(default_factory=dict)
    """Name → data set, as loaded for the first modality; :meth:`run` adds the data sets."""
    results: list[Result] = field(default_factory=list)
    speeds: dict[int, dict[str, float]] = field(default_factory=dict)
    """Batch size → name of a model → samples per second; empty without a measurement of speeds."""

    def run(self, device: str, autocast_dtype: torch.dtype | None = None) -> None:
        """Measure all models on all data sets, and append the measurements to ``results``.

        Args:
            device: Device of the models: cpu or cuda.
            autocast_dtype: Dtype of autocast; ``None``: compute in float32.
        """
        for modality, embeds in self.groups.items():
            datasets, augment = self.load(modality)
            rows = rows_of(embeds, self.infos)
            to_device = partial(Tensor.to, device=device)
            settings = self.settings._replace(augment=augment, to_device=to_device, progress="")
            for dataset, labeled in datasets.items():
                self.datasets.setdefault(dataset, labeled)  # the first group is the model's
                print(
                    f"embedding {sum(labeled.num_samples):,} samples of {dataset} with each of: {', '.join(embeds)}",
                    file=sys.stderr,
                )
                with torch.inference_mode(), precision_of(autocast_dtype, device):
                    embedded = embed_set(embeds, dataset, labeled, settings, self.infos)
                    check_finite(dataset, embedded)
                    self.results += measure(rows, embedded, dataset, labeled, settings, self.infos, self.weights)

    def write(self, folder: Path, context: dict[str, Any]) -> None:
        """Write ``evaluation.json`` and ``evaluation.csv``, which contain all results, to a folder.

        Args:
            folder: The folder.
            context: Further entries of the JSON file; their secrets are hidden.
        """

        def cell(dataset: str, column: Column, interval: Interval) -> dict[str, Any]:
            place = {"dataset": dataset, "bank": column.bank, "measure": column.name, "k": column.k}
            return place | interval._asdict()

        rows = [
            {
                "candidate": result.row,
                "embedding": result.embedding,
                "of": result.info.of,
                "alignment": result.info.fingerprint,
                "weights": result.weights,
            }
            | cell(result.dataset, result.column, result.interval)
            for result in self.results
        ]
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        entries = {
            "embedding": self.settings.headline,
            "class_names": {name: labeled.class_names for name, labeled in self.datasets.items()},
            "results": rows,
            "teacher_gap_closed": [
                cell(dataset, column, closed.interval)
                for dataset in self.datasets
                for column, cells in pivot(self.results, dataset).items()
                if (closed := gap_closed(cells)) is not None and closed.interval is not None
            ],
            "candidates": [
                {
                    "name": name,
                    "parameters": costs["num_parameters"],
                    "gflop_per_input": costs["gflop"],
                    "per_second": {size: speeds[name] for size, speeds in self.speeds.items() if name in speeds},
                }
                for name, costs in self.costs.items()
            ],
        }
        write_atomically(folder / "evaluation.json", json.dumps(hide_secrets(context) | entries, indent=1) + "\n")
        write_atomically(folder / "evaluation.csv", table.getvalue())


def read_evaluation(folder: Path, weights: str) -> dict[str, Any]:
    """Return a folder's ``evaluation.json`` as a dict; {} if the file is missing, corrupt or for other weights."""
    with suppress(Exception):
        contents = json.loads((folder / "evaluation.json").read_bytes())
        if contents["weights"] == weights:
            return contents
    return {}


def check_replaceable(folder: Path, weights: str) -> None:
    """Check that an evaluation's files can be written to a folder, and would replace only results of these weights."""
    for path in (folder / f"evaluation.{suffix}" for suffix in ("json", "csv", "png", "html")):
        check_out_file(path)
        if os.path.lexists(path) and not read_evaluation(folder, weights):
            raise InputError(
                f"out: {path} exists, but {folder} has no results of the same model and weights; remove the file, "
                "or choose another folder"
            )
