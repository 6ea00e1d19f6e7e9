"""What a run left behind: its record, its log, and what its last retrieval found."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import Tensor

from d2v_composer.callbacks.jsonl_logger import read_jsonl
from d2v_composer.checkpoints.pointer import read_newest
from d2v_composer.checkpoints.safe_pickle import load_untrusted
from d2v_composer.data.labelled_sets import LabelledSet, load_labelled_set
from d2v_composer.evaluation.metric_names import metric_key
from d2v_composer.system.errors import InputError

__all__ = ["Run", "read_run"]

# What images of any size are shown in, in pixels a side.
SHOWN_SIZE = 96
SECTIONS = ("config", "command", "teacher", "versions", "hardware")

Neighbours = Mapping[str, Mapping[str, Tensor]]


class Run(NamedTuple):
    """Everything a report is made of."""

    record: Mapping[str, Any]
    """As in run.yaml: config, command, teacher, versions, hardware."""
    log: Mapping[str, Mapping[int, float]]
    """key → step → value."""
    neighbours: Neighbours
    """Of :class:`~d2v_composer.callbacks.ZeroShotRetrieval`."""
    datasets: Mapping[str, LabelledSet]
    """The images that were looked up; those of a data set that is gone are not here."""

    @property
    def dataset_names(self) -> list[str]:
        """Those with a retrieval in the log."""
        chosen = self.record["config"]["retrieval"]["datasets"]
        return [name for name in chosen if metric_key(name, "train", self.smallest_k) in self.log]

    @property
    def looked_up(self) -> list[str]:
        """The data sets whose neighbours can be shown: those of which neither images nor neighbours are missing."""
        return [
            name
            for name, labelled in self.datasets.items()
            if name in self.neighbours
            and tuple(len(self.neighbours[name][bank]) for bank in ("test", "train")) == labelled.num_images
        ]

    @property
    def smallest_k(self) -> int:
        return min(self.record["config"]["retrieval"]["ks"])

    def last(self, key: str) -> float | None:
        """The latest value of a key; ``None`` where nobody logged it."""
        return self.log[key][max(self.log[key])] if self.log.get(key) else None

    def first_student(self, dataset: str) -> float | None:
        """The untrained student's accuracy, where it was measured."""
        return self.log[metric_key(dataset, "train", self.smallest_k)].get(0)


def read_run(folder: Path) -> Run:
    """A run's folder as ``recipes/train.py`` leaves it, finished or not.

    The retrieval's pictures are of the newest checkpoint's, and of the data sets that are still there.

    Raises:
        InputError: It is none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a run's save_folder")
    record_file, log_file = folder / "run.yaml", folder / "log.jsonl"
    for file in (record_file, log_file):
        if not file.is_file():
            raise InputError(f"{file}: no such file; a report is made of a run's run.yaml and log.jsonl")
    try:
        record = yaml.safe_load(record_file.read_text())
        chosen = {section: record[section] for section in SECTIONS}["config"]["retrieval"]["datasets"]
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise InputError(f"{record_file}: not the record of a run ({type(error).__name__})") from error
    return Run(record, read_jsonl(log_file), _neighbours(folder / "latest-rank0.pt"), dict(_still_there(chosen)))


def _neighbours(checkpoint: Path) -> Neighbours:
    """What the last retrieval found before a checkpoint; nothing where there is no checkpoint or no retrieval."""
    if not checkpoint.is_file():
        return {}
    try:
        return (
            read_newest(checkpoint, load_untrusted)["state"]["callbacks"]
            .get("ZeroShotRetrieval", {})
            .get("neighbours", {})
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{checkpoint}: not a checkpoint of recipes/train.py (no {error})") from error


def _still_there(chosen: Mapping[str, Mapping[str, Any] | None]) -> Iterator[tuple[str, LabelledSet]]:
    """The data sets that can be loaded; a report does without the others' pictures."""
    for name, labelled in chosen.items():
        if labelled is None:
            continue
        try:
            columns = {key: labelled[key] for key in ("column", "label_column") if key in labelled}
            yield name, load_labelled_set(labelled["format"], labelled["root"], image_size=SHOWN_SIZE, **columns)
        except InputError as error:
            print(f"{name}: its images are left out: {error}")
