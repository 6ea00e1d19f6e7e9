"""Format the results of a run, an evaluation and a study as text tables."""

from collections.abc import Mapping, Sequence
from itertools import product
from statistics import mean
from typing import TYPE_CHECKING

from tabulate import tabulate

from d2v_composer.evaluation.evaluate import Evaluation, Interval, Log, gap_closed, gap_closed_by_step
from d2v_composer.evaluation.metrics import AGREEMENT, BANKS, Measure, metric_key
from d2v_composer.report.run import EMBEDDINGS

if TYPE_CHECKING:
    from d2v_composer.callbacks.zero_shot_retrieval import ZeroShotRetrieval


PROBE_HEADS = {"knn/top1": "20-NN weighted", "knn_majority/top1": "20-NN majority", "linear/top1": "linear probe"}
CLASSIFIED, FITTED, UNLABELED = (
    "Zero-shot retrieval",
    "Probes fitted on train, measured on test",
    "Measured without labels",
)
DATASET = "cifar10"


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]], style: str = "plain") -> str:
    """Format a table of at least one row: first column aligned left, the others right, missing cells empty."""
    return tabulate(rows, head, style, stralign="right", colalign=("left",), disable_numparse=True)


def retrieval_table(retrieval: "ZeroShotRetrieval") -> str:
    """Return a table per data set: accuracy of the baselines and of the student, and the teacher gap closed.

    The student before training is included if the run measured it (``retrieval.at_start``).
    """
    first, last = retrieval.history[0], retrieval.history[-1]
    before, after, teacher = "student before", "student after", "teacher"
    names = [name for name in retrieval.baselines or {} if name != teacher]
    students = {before: {} if first["batch"] else first["metrics"], after: last["metrics"]}
    tables = []
    for dataset, labeled in retrieval.datasets.items():
        columns = retrieval.measures(dataset)
        head = _head(columns)
        rows: dict[str, list[float]] = {}
        for name in (*names, *students, teacher):
            baseline, metrics = (None, students[name]) if name in students else (name, retrieval.baseline_metrics)
            keys = [metric_key(dataset, bank, measure, baseline=baseline) for bank, measure in columns]
            if all(key in metrics for key in keys):  # a resume may ask for another set, k or probe
                rows[name] = [round(100 * metrics[key], 1) for key in keys]  # the gap is that of the numbers shown
        if not rows:
            continue
        cells = [[name, *(f"{value:.1f}" for value in row)] for name, row in rows.items()]
        what, unit = (CLASSIFIED, "accuracy in %") if labeled.has_labels else (UNLABELED, "in %")
        title = f"{what} on {dataset}, {retrieval.primary}, batch {last['batch']}, {unit}"
        tables.append(f"{title}\n{format_table(head, cells)}")
        if {before, after, teacher} <= rows.keys():
            closed = gap_closed(rows[before][0], rows[after][0], rows[teacher][0])
            said = (
                "none: the teacher is no better than the student before training"
                if closed is None
                else f"{100 * closed:.0f} %"
            )
            tables[-1] += f"\nteacher gap closed ({head[1]}): {said}"
    return "\n\n".join(tables)


def evaluation_tables(evaluation: Evaluation) -> str:
    """Return tables of accuracies with intervals, the teacher gap closed, and the size of each model."""
    primaries, parts = evaluation.primaries, []
    for dataset, what in product(evaluation.class_names, (CLASSIFIED, FITTED, UNLABELED)):
        columns = [(bank, measure) for bank, measure in evaluation.measures(dataset) if _kind(measure) == what]
        rows = [
            [name, *(_percent(primaries[name, dataset, bank].accuracy(measure)) for bank, measure in columns)]
            for name, *_ in evaluation.candidates
        ]
        closed = [evaluation.gap_closed(dataset, bank, measure) for bank, measure in columns]
        if any(closed):
            rows.append(["teacher gap closed", *map(_percent, closed)])
        if columns:
            unit = "in %" if what == UNLABELED else "accuracy in %"
            title = f"{what} on {dataset}, {evaluation.primary}, {unit} [95 % interval]"
            parts.append(f"{title}\n{format_table(_head(columns), rows)}")
    costs = [[name, f"{number / 1e6:.2f}", f"{gflop:.2f}"] for name, _, number, gflop in evaluation.candidates]
    return "\n\n".join([*parts, format_table(["", "M parameters", f"GFLOP/{evaluation.each}"], costs)])


def _head(columns: Sequence[tuple[str, Measure]]) -> list[str]:
    return ["", *(measure_head(each) if isinstance(each, str) else f"bank {bank} top-{each}" for bank, each in columns)]


def measure_head(measure: str) -> str:
    """Return the heading of the column for a probe's measure."""
    return {**PROBE_HEADS, AGREEMENT: "neighbor agreement"}.get(measure) or measure.replace("/top", " top-")


def _kind(measure: Measure) -> str:
    if isinstance(measure, int):
        return CLASSIFIED
    return FITTED if measure in PROBE_HEADS else UNLABELED


def _percent(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def study_table(logs: Mapping[str, Log]) -> str:
    """Return a table of each run's top-1 on ``DATASET`` in %, bank train / test, and its teacher gap closed.

    The gap closed is the mean of both banks. The untrained student and the teacher are the first run's, or the run's
    own, which then stand below it. Loss: mean of the last 100 batches; s: seconds of training without evaluations.

    Args:
        logs: Name → log; embeddings that the first run lacks are not shown.
    """
    first = next(iter(logs.values()))
    names = [name for name in EMBEDDINGS if _top1(first, name) != "–"]
    lines = [["untrained", *(_top1(first, name, step=0) for name in names)]]
    for run, log in logs.items():
        has_own = _top1(log, names[0], "teacher") != "–"
        cells = []
        for name in names:
            closed = gap_closed_by_step(log, DATASET, name, baselines=log if has_own else first)
            cells.append(f"{_top1(log, name)} ({f'{100 * closed[max(closed)]:.0f} %' if closed else '–'})")
        losses, paces = log["loss/train/total"], log.get("throughput/images_per_sec", {}).values()
        loss = mean(losses[step] for step in sorted(losses)[-100:])
        seconds = f"{max(log['time/sample'].values()) * mean(1 / pace for pace in paces):.0f}" if paces else "–"
        lines.append([run, *cells, f"{loss:.3f}", seconds])
        if has_own and log is not first:
            lines.append(["– its untrained", *(_top1(log, name, step=0) for name in names)])
            lines.append(["– its teacher", *(_top1(log, name, "teacher") for name in names)])
    lines.append(["teacher", *(_top1(first, name, "teacher") for name in names)])
    return format_table(["bank train / bank test", *names, "loss", "s"], lines, "github")


def _top1(log: Log, embedding: str, baseline: str | None = None, step: int | None = None) -> str:
    """Return top-1 in % with each bank, at a given step or the last one."""
    values = [log.get(metric_key(DATASET, bank, 1, embedding, baseline), {}) for bank in BANKS]
    steps = [max(each, default=0) if step is None else step for each in values]
    return " / ".join(f"{100 * each[at]:.1f}" for each, at in zip(values, steps, strict=True) if at in each) or "–"
