"""Read a run's folder: its record, its log, and the neighbors that its last retrieval found."""

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml
from torch import Tensor

from d2v_composer.checkpoints.safe_load import LATEST, load_untrusted, read_newest
from d2v_composer.checkpoints.student_file import PrimaryEmbedding
from d2v_composer.data.labeled import LabeledSet, load_labeled_set
from d2v_composer.evaluation.metrics import PROBES, Measure, metric_key, primary_fallbacks, read_jsonl
from d2v_composer.models.names import Pooling, Representation
from d2v_composer.system.errors import InputError, reading

# Side of the images of a folder in a gallery, in pixels.
SHOWN_SIZE = 96
# Embeddings of a student and a teacher; without CLS the first of each representation is missing.
EMBEDDINGS = [
    f"{representation}_{pooling}" for representation in get_args(Representation) for pooling in get_args(Pooling)
]
SECTIONS = ("config", "command", "versions", "hardware")

Neighbors = Mapping[str, Mapping[str, Tensor]]


class Run(NamedTuple):
    """The contents of a report."""

    record: Mapping[str, Any]
    """The sections of run.yaml: config, command, versions, hardware, and teacher (or model, after fine-tuning)."""
    log: Mapping[str, Mapping[int, float]]
    """key → step → value."""
    neighbors: Neighbors
    """As in :class:`~d2v_composer.callbacks.ZeroShotRetrieval`."""
    datasets: Mapping[str, LabeledSet]
    """The images of the data sets that can still be read."""

    @property
    def dataset_names(self) -> list[str]:
        """The data sets with a retrieval in the log."""
        chosen = sets_of(self.record)
        return [name for name in chosen if metric_key(name, "train", self.smallest_k) in self.log]

    @property
    def probed(self) -> list[str]:
        """The data sets with a probe in the log."""
        measures = list(chain(*PROBES.values()))
        return [name for name in self.dataset_names if any(self.accuracies(name, "train", each) for each in measures)]

    @property
    def looked_up(self) -> list[str]:
        """The data sets whose neighbors are known, for the same numbers of images."""
        return [
            name
            for name, labeled in self.datasets.items()
            if name in self.neighbors
            and tuple(len(self.neighbors[name][bank]) for bank in ("test", "train")) == labeled.num_images
        ]

    @property
    def smallest_k(self) -> int:
        return min(self.record["config"]["retrieval"]["ks"])

    def last(self, key: str) -> float | None:
        """Return the latest value of a key; ``None`` if it was never logged."""
        return latest(self.log.get(key, {}))

    def accuracies(self, dataset: str, bank: str, measure: Measure, baseline: str | None = None) -> Mapping[int, float]:
        """Return step → accuracy in the present primary embedding, of the student or a baseline.

        The log's short keys are those of the primary embedding at that step, and a resume may have chosen another.
        """
        retrieval = self.record["config"]["retrieval"]
        primary = PrimaryEmbedding(retrieval["representation"], retrieval["pooling"]).name
        names = [primary] if baseline is None else primary_fallbacks(primary)
        keys = [metric_key(dataset, bank, measure, name, baseline) for name in (*names, None)]
        return next((self.log[key] for key in keys if key in self.log), {})


def latest(values: Mapping[int, float]) -> float | None:
    """Return the value of the last step; ``None`` without any."""
    return values[max(values)] if values else None


def weights_section(record: Mapping[str, Any]) -> str:
    """Return the section of a record about the source of the weights; a fine-tuning run's is ``model``."""
    return "model" if "model" in record else "teacher"


def sets_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the data sets of a run's retrieval; a fine-tuning run has none."""
    config = record["config"]
    return {} if "dataset" in config else config["retrieval"]["datasets"]


def read_run(folder: Path) -> Run:
    """Read the folder of a finished or unfinished run of ``recipes/train.py`` or ``recipes/finetune.py``.

    The neighbors are those of the newest checkpoint; images that cannot be read are left out, with a printed line.

    Raises:
        InputError: It is not the folder of a run, or its newest checkpoint is corrupt.
    """
    record_file, log_file, checkpoint = folder / "run.yaml", folder / "log.jsonl", folder / LATEST
    with reading(record_file):
        record = yaml.safe_load(record_file.read_text())
        chosen = sets_of({section: record[section] for section in (*SECTIONS, weights_section(record))})
        max_images = record["config"].get("retrieval", {}).get("max_images")
    with reading(log_file):
        log = read_jsonl(log_file)
    neighbors: Neighbors = {}
    if checkpoint.is_file():
        with reading(checkpoint):
            callbacks = read_newest(checkpoint, load_untrusted)["state"]["callbacks"]
            neighbors = callbacks.get("ZeroShotRetrieval", {}).get("neighbors", {})
    datasets = {}
    for name, labeled in chosen.items():
        options = {"download": False, "image_size": SHOWN_SIZE, "interpolation": "bicubic", "max_images": max_images}
        try:
            if labeled is not None:
                datasets[name] = load_labeled_set(**labeled | options).numbered()
        except InputError as error:
            print(f"{name}: without its images: {error}")
    return Run(record, log, neighbors, datasets)
