"""Format the results of a training and of an evaluation as text."""

from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

from tabulate import tabulate

from d2v_composer.evaluation.evaluate import Evaluation, Interval, gap_closed, gap_closed_by_step
from d2v_composer.evaluation.metrics import BANKS, EMBEDDINGS, Measure, metric_key, read_jsonl
from d2v_composer.system.errors import InputError

if TYPE_CHECKING:
    from d2v_composer.callbacks.zero_shot_retrieval import ZeroShotRetrieval


# MERGED FROM d2v_composer/report/tables.py: Format rows as a table of plain text or Markdown.


def format_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, markdown: bool = False) -> str:
    """Return a table whose first column is aligned left and whose other columns are aligned right.

    Args:
        head: The name of each column.
        rows: The cells of each row; missing ones are empty.
        markdown: Draw the lines of a Markdown table.
    """
    cells = list(rows)
    return tabulate(
        cells,
        head,
        tablefmt="github" if markdown else "plain",
        stralign="right",
        colalign=("left",) if cells else None,  # tabulate fails without rows
        disable_numparse=True,
    )


PROBE_HEADS = {"knn": "20-NN weighted", "knn_majority": "20-NN majority", "linear": "linear probe"}


def retrieval_table(retrieval: "ZeroShotRetrieval") -> str:
    """Return a table per data set with the accuracies of baselines and student, and the share recovered.

    The student before training is included if the run measured it (``retrieval.at_start``).
    """
    return "\n\n".join(_dataset_table(retrieval, dataset) for dataset in retrieval.datasets)


def _dataset_table(retrieval: "ZeroShotRetrieval", dataset: str) -> str:
    columns = retrieval.measures
    first, last, baselines = retrieval.history[0], retrieval.history[-1], retrieval.baseline_metrics
    measured = {
        **{name: (baselines, name) for name in retrieval.baselines or {} if name != "teacher"},
        "student before": (first["metrics"] if first["batch"] == 0 else {}, None),
        "student after": (last["metrics"], None),
        "teacher": (baselines, "teacher"),
    }
    rows: dict[str, list[float]] = {}
    for name, (metrics, baseline) in measured.items():
        keys = [metric_key(dataset, bank, measure, baseline=baseline) for bank, measure in columns]
        if all(key in metrics for key in keys):  # a resume may ask for another set, k or probe
            rows[name] = [metrics[key] for key in keys]

    head = _head(columns)
    title = f"Zero-shot retrieval on {dataset}, {retrieval.primary}, batch {last['batch']}, accuracy in %"
    cells = [[name, *(f"{100 * value:.1f}" for value in row)] for name, row in rows.items()]
    lines = [title, format_table(head, cells)]
    if {"student before", "student after", "teacher"} <= rows.keys():
        share = gap_closed(rows["student before"][0], rows["student after"][0], rows["teacher"][0])
        what = f"of the teacher's advantage over the untrained student ({head[1]})"
        lines.append(f"none {what}: the teacher has none" if share is None else f"{100 * share:.0f} % {what} recovered")
    return "\n".join(lines)


def evaluation_tables(evaluation: Evaluation) -> str:
    """Return accuracies with their intervals, the share recovered, the accuracy of each class, and costs."""
    parts = []
    looked_up = [(bank, measure) for bank, measure in evaluation.measures if isinstance(measure, int)]
    probed = [column for column in evaluation.measures if column not in looked_up]
    for dataset in evaluation.datasets:
        parts.append(_accuracy_table(evaluation, dataset, "Zero-shot retrieval", looked_up))
        if probed:
            parts.append(_accuracy_table(evaluation, dataset, "Probes fitted to train, judged on test", probed))
        parts.append(_class_table(evaluation, dataset))
    images_per_second = {each.candidate: each.images_per_second for each in reversed(evaluation.retrievals)}
    costs = [
        [name, f"{num_parameters / 1e6:.2f}", f"{gflop:.2f}", f"{images_per_second[name]:.0f}"]
        for name, _, num_parameters, gflop in evaluation.candidates
    ]
    return "\n\n".join([*parts, format_table(["", "M parameters", "GFLOP/image", "images/s"], costs)])


def _accuracy_table(evaluation: Evaluation, dataset: str, what: str, columns: Sequence[tuple[str, Measure]]) -> str:
    primaries, head = evaluation.primaries, _head(columns)
    rows = [
        [name, *(_percent(primaries[name, dataset, bank].accuracy(measure)) for bank, measure in columns)]
        for name in (candidate.name for candidate in evaluation.candidates)
    ]
    if ("train", "linear") in columns:
        head.append("L2 strength")
        for row in rows:
            row.append(f"{primaries[row[0], dataset, 'train'].strength:g}")
    shares = [evaluation.gap_closed(dataset, bank, measure) for bank, measure in columns]
    if any(shares):
        rows.append(["share recovered", *("–" if share is None else _percent(share) for share in shares)])
    title = f"{what} on {dataset}, {evaluation.primary}, accuracy in % [95 % interval]"
    return f"{title}\n{format_table(head, rows)}"


def _class_table(evaluation: Evaluation, dataset: str) -> str:
    """Return the student's (or teacher's) top-1 of each class, and the class it is most often confused with."""
    primaries = evaluation.primaries
    name = "student" if ("student", dataset, "train") in primaries else "teacher"
    found = primaries[name, dataset, "train"]
    rows = []
    for label, accuracy in enumerate(found.class_accuracy):
        others = found.confusion[label].copy()
        others[label] = 0
        confused_with = evaluation.class_name(dataset, int(others.argmax())) if others.any() else "–"
        percent = "–" if isnan(accuracy) else f"{100 * accuracy:.1f}"
        rows.append([evaluation.class_name(dataset, label), percent, confused_with])
    title = f"{name}, bank train, top-1 in % of each class, and the class it is most often confused with"
    return f"{title}\n{format_table(['', 'top-1', 'confused with'], rows)}"


def _head(columns: Sequence[tuple[str, Measure]]) -> list[str]:
    names = [PROBE_HEADS[each] if isinstance(each, str) else f"bank {bank} top-{each}" for bank, each in columns]
    return ["", *names]


def _percent(interval: Interval) -> str:
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


# MERGED FROM d2v_composer/report/tables.py: The table of a study's runs: what each retrieves, and how much of the

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

    def accuracies(self, embedding: str, *, untrained: bool = False, baseline: str | None = None) -> list[float]:
        """Return the top-1 of the last evaluation, or of that before training, with each bank; empty: not measured."""
        logs = [self.log.get(metric_key(DATASET, bank, 1, embedding, baseline), {}) for bank in BANKS]
        steps = [0 if untrained else max(values, default=0) for values in logs]
        return [values[step] for values, step in zip(logs, steps, strict=True) if step in values]

    @property
    def embeddings(self) -> list[str]:
        """Those that it measured: a model without CLS has fewer."""
        return [name for name in EMBEDDINGS if self.accuracies(name)]

    @property
    def has_baselines(self) -> bool:
        """It measured its own untrained student and teacher."""
        first, *_ = self.embeddings
        return bool(self.accuracies(first, untrained=True) and self.accuracies(first, baseline="teacher"))

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
    lines = [_baselines("untrained", first, names, untrained=True)]
    for row in rows:
        baselines = row if row.has_baselines else first
        cells = [f"{_both_ways(row, name)} ({_share(baselines, row, name)})" for name in names]
        lines.append([row.name, *cells, f"{row.loss:.3f}", "–" if row.seconds is None else f"{row.seconds:.0f}"])
        if row.has_baselines and row is not first:
            lines.append(_baselines("– its untrained", row, names, untrained=True))
            lines.append(_baselines("– its teacher", row, names, baseline="teacher"))
    lines.append(_baselines("teacher", first, names, baseline="teacher"))
    return format_table(["bank train / bank test", *names, "loss", "s"], lines, markdown=True)


def _baselines(title: str, row: FinishedRun, names: Sequence[str], **options: Any) -> list[str]:
    return [title, *(_both_ways(row, name, **options) for name in names), "", ""]


def _both_ways(row: FinishedRun, embedding: str, **options: Any) -> str:
    return " / ".join(f"{100 * accuracy:.1f}" for accuracy in row.accuracies(embedding, **options)) or "–"


def _share(baselines: FinishedRun, row: FinishedRun, embedding: str) -> str:
    shares = gap_closed_by_step(row.log, DATASET, embedding, baselines=baselines.log)
    return f"{100 * shares[max(shares)]:.0f} %" if shares else "–"
