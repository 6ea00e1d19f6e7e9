"""Format the results of a run, an evaluation and a study as text tables."""

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
    """Return a table per data set: accuracy of the baselines and of the student, and the teacher gap closed.

    The student before training is included if the run measured it (``retrieval.at_start``).
    """
    columns, baselines = retrieval.measures, retrieval.baseline_metrics
    first, last = retrieval.history[0], retrieval.history[-1]
    before, after, teacher = "student before", "student after", "teacher"
    measured = {
        **{name: (baselines, name) for name in retrieval.baselines or {} if name != teacher},
        before: (first["metrics"] if first["batch"] == 0 else {}, None),
        after: (last["metrics"], None),
        teacher: (baselines, teacher),
    }
    head, tables = _head(columns), []
    for dataset in retrieval.datasets:
        rows: dict[str, list[float]] = {}
        for name, (metrics, baseline) in measured.items():
            keys = [metric_key(dataset, bank, measure, baseline=baseline) for bank, measure in columns]
            if all(key in metrics for key in keys):  # a resume may ask for another set, k or probe
                rows[name] = [metrics[key] for key in keys]
        cells = [[name, *(f"{100 * value:.1f}" for value in row)] for name, row in rows.items()]
        title = f"Zero-shot retrieval on {dataset}, {retrieval.primary}, batch {last['batch']}, accuracy in %"
        lines = [title, format_table(head, cells)]
        if {before, after, teacher} <= rows.keys():
            closed = gap_closed(rows[before][0], rows[after][0], rows[teacher][0])
            said = "none: the teacher is no better than before training" if closed is None else f"{100 * closed:.0f} %"
            lines.append(f"teacher gap closed ({head[1]}): {said}")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def evaluation_tables(evaluation: Evaluation) -> str:
    """Return accuracies with intervals, the teacher gap closed, the accuracy of each class, and costs."""
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
    closed = [evaluation.gap_closed(dataset, bank, measure) for bank, measure in columns]
    if any(closed):
        rows.append(["teacher gap closed", *("–" if each is None else _percent(each) for each in closed)])
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


DATASET = "cifar10"


class FinishedRun(NamedTuple):
    """A finished run of a study, on the data set ``DATASET``."""

    name: str
    log: Mapping[str, Mapping[int, float]]

    @classmethod
    def read(cls, name: str, folder: Path) -> "FinishedRun":
        """Read a run's log.

        Raises:
            InputError: There is none.
        """
        path = folder / "log.jsonl"
        if not path.is_file():
            raise InputError(f"{path}: no such file; a study's base.yaml needs loggers: {{jsonl: {{}}}}")
        return cls(name, read_jsonl(path))

    def accuracies(self, embedding: str, *, untrained: bool = False, baseline: str | None = None) -> list[float]:
        """Return top-1 of the last evaluation, or of the one before training, with each bank; empty: not measured."""
        logs = [self.log.get(metric_key(DATASET, bank, 1, embedding, baseline), {}) for bank in BANKS]
        steps = [0 if untrained else max(values, default=0) for values in logs]
        return [values[step] for values, step in zip(logs, steps, strict=True) if step in values]

    @property
    def embeddings(self) -> list[str]:
        """The measured embeddings; a model without CLS has fewer."""
        return [name for name in EMBEDDINGS if self.accuracies(name)]

    @property
    def has_baselines(self) -> bool:
        """True if it measured its own untrained student and teacher."""
        first, *_ = self.embeddings
        return bool(self.accuracies(first, untrained=True) and self.accuracies(first, baseline="teacher"))

    def cells(self, embeddings: Sequence[str], **options: Any) -> list[str]:
        """Return top-1 in % with both banks, for each embedding; see :meth:`accuracies`."""
        values = [self.accuracies(name, **options) for name in embeddings]
        return [" / ".join(f"{100 * accuracy:.1f}" for accuracy in both) or "–" for both in values]


def study_table(rows: Sequence[FinishedRun]) -> str:
    """Return top-1 of each run and embedding in %, bank train / test, and the teacher gap closed.

    The gap closed is the mean of both banks. The untrained student and the teacher are the first run's, or the run's
    own, which then stand below it. Loss: mean of the last 100 batches; s: seconds of training without evaluations.
    """
    first, *_ = rows
    names = first.embeddings
    lines = [["untrained", *first.cells(names, untrained=True)]]
    for row in rows:
        baselines = (row if row.has_baselines else first).log
        closed = [gap_closed_by_step(row.log, DATASET, name, baselines=baselines) for name in names]
        shown = [f" ({100 * each[max(each)]:.0f} %)" if each else " (–)" for each in closed]
        losses, paces = row.log["loss/train/total"], row.log.get("throughput/images_per_sec", {}).values()
        loss = mean(losses[step] for step in sorted(losses)[-100:])
        seconds = f"{max(row.log['time/sample'].values()) * mean(1 / pace for pace in paces):.0f}" if paces else "–"
        cells = [accuracy + gap for accuracy, gap in zip(row.cells(names), shown, strict=True)]
        lines.append([row.name, *cells, f"{loss:.3f}", seconds])
        if row.has_baselines and row is not first:
            lines.append(["– its untrained", *row.cells(names, untrained=True)])
            lines.append(["– its teacher", *row.cells(names, baseline="teacher")])
    lines.append(["teacher", *first.cells(names, baseline="teacher")])
    return format_table(["bank train / bank test", *names, "loss", "s"], lines, markdown=True)
