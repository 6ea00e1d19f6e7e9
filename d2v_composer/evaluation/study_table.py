"""The table of a study's runs: what each retrieves, and how much of the teacher's advantage it recovers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from d2v_composer.evaluation.metric_names import BANKS, EMBEDDINGS, metric_key
from d2v_composer.evaluation.metrics_log import read_jsonl
from d2v_composer.evaluation.recovered import recovered_shares
from d2v_composer.evaluation.text_table import format_table
from d2v_composer.system.errors import InputError

__all__ = ["DATASET", "FinishedRun", "study_table"]

DATASET = "cifar10"


class FinishedRun(NamedTuple):
    """A finished run."""

    name: str
    log: Mapping[str, Mapping[int, float]]

    @classmethod
    def read(cls, name: str, folder: Path) -> "FinishedRun":
        """Read a run's log.

        Raises:
            InputError: It has none.
        """
        path = folder / "log.jsonl"
        if not path.is_file():
            raise InputError(f"{path}: no such file; a study's base.yaml needs loggers: {{jsonl: {{}}}}")
        return cls(name, read_jsonl(path))

    def accuracies(self, embedding: str, *, untrained: bool = False, reference: str | None = None) -> list[float]:
        """Return the top-1 of the last evaluation, or of that before training, with each bank; empty: not measured."""
        logs = [self.log.get(metric_key(DATASET, bank, 1, embedding, reference), {}) for bank in BANKS]
        steps = [0 if untrained else max(values, default=0) for values in logs]
        return [values[step] for values, step in zip(logs, steps, strict=True) if step in values]

    @property
    def embeddings(self) -> list[str]:
        """Those that it measured: a model without CLS has fewer."""
        return [name for name in EMBEDDINGS if self.accuracies(name)]

    @property
    def has_references(self) -> bool:
        """It measured its own untrained student and teacher."""
        first, *_ = self.embeddings
        return bool(self.accuracies(first, untrained=True) and self.accuracies(first, reference="teacher"))

    @property
    def loss(self) -> float:
        """The mean of the last 100 batches."""
        losses = self.log["loss/train/total"]
        return mean(losses[step] for step in sorted(losses)[-100:])

    @property
    def seconds(self) -> float | None:
        """The time of training, without evaluations; ``None``: it was too short to tell."""
        paces = self.log.get("throughput/images_per_sec", {}).values()
        return max(self.log["time/sample"].values()) * mean(1 / pace for pace in paces) if paces else None


def study_table(rows: Sequence[FinishedRun]) -> str:
    """Return top-1 of every row and embedding in %, bank train / test, and the share of the teacher's advantage.

    The share is the mean of both directions, from the untrained student to the teacher: the first row's, or the row's
    own, which then stand below it.
    """
    first, *_ = rows
    names = first.embeddings
    lines = [_references("untrained", first, names, untrained=True)]
    for row in rows:
        references = row if row.has_references else first
        cells = [f"{_both_ways(row, name)} ({_share(references, row, name)})" for name in names]
        lines.append([row.name, *cells, f"{row.loss:.3f}", "–" if row.seconds is None else f"{row.seconds:.0f}"])
        if row.has_references and row is not first:
            lines.append(_references("– its untrained", row, names, untrained=True))
            lines.append(_references("– its teacher", row, names, reference="teacher"))
    lines.append(_references("teacher", first, names, reference="teacher"))
    return format_table(["bank train / bank test", *names, "loss", "s"], lines, markdown=True)


def _references(title: str, row: FinishedRun, names: Sequence[str], **options: Any) -> list[str]:
    return [title, *(_both_ways(row, name, **options) for name in names), "", ""]


def _both_ways(row: FinishedRun, embedding: str, **options: Any) -> str:
    return " / ".join(f"{100 * accuracy:.1f}" for accuracy in row.accuracies(embedding, **options)) or "–"


def _share(references: FinishedRun, row: FinishedRun, embedding: str) -> str:
    shares = recovered_shares(row.log, DATASET, embedding, references=references.log)
    return f"{100 * shares[max(shares)]:.0f} %" if shares else "–"
