"""Format the results of runs, evaluations and studies as tables."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import mean

from tabulate import tabulate

from d2v_composer.evaluation.evaluate import Evaluation
from d2v_composer.evaluation.metrics import METRICS
from d2v_composer.evaluation.metrics.metric import BANKS
from d2v_composer.evaluation.metrics.retrieval import retrieval_from
from d2v_composer.evaluation.results import (
    Interval,
    Result,
    gap_closed,
    gap_closed_by_step,
    heading,
    label,
    last_batch,
    pivot,
)
from d2v_composer.evaluation.rows import GAP_CLOSED, ROWS, STUDENT, TEACHER, UNTRAINED, metric_key
from d2v_composer.evaluation.run_log import Log
from d2v_composer.models.names import EMBEDDING, RAW_EMBEDDINGS

DATASET = "cifar10"


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]], style: str = "plain") -> str:
    """Return a table of at least one row as text."""
    return tabulate(rows, head, style, stralign="right", colalign=("left",), disable_numparse=True)


def accuracy_tables(results: Sequence[Result], datasets: Iterable[str]) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield the title and the lines, head and rows, of each table of accuracies in %, with 95 % intervals."""
    batch = last_batch(results)
    for dataset in datasets:
        of_dataset = pivot(results, dataset)
        for table in dict.fromkeys(metric.table for metric in METRICS):
            names = {metric.name for metric in METRICS if metric.table == table}
            columns = {column: cells for column, cells in of_dataset.items() if column.metric in names}
            if not columns:
                continue
            texts = {row: result.embedding_text for cells in columns.values() for row, result in cells.items()}
            embedding = heading(texts)
            title = f"{table.title} on {dataset}" + (f", embedding: {embedding}" if embedding else "")
            title += f", batch {batch}" if batch else ""
            lines = [
                [label(row, texts[row], embedding)]
                + [percent(cells[row].interval) if row in cells else "–" for cells in columns.values()]
                for row in sorted(texts, key=lambda row: (*ROWS, row).index(row))
            ]
            if any(closed := [gap_closed(cells) for cells in columns.values()]):
                shown = [percent(gap.interval, 0) if gap and gap.interval else "–" for gap in closed]
                lines.append([GAP_CLOSED, *shown])
            yield title, [["in % [95 % interval]", *(column.heading for column in columns)], *lines]


def format_tables(results: Sequence[Result], datasets: Iterable[str]) -> str:
    """Return :func:`accuracy_tables` as text."""
    tables = accuracy_tables(results, datasets)
    return "\n\n".join(f"{title}\n{format_table(head, rows)}" for title, (head, *rows) in tables)


def evaluation_tables(evaluation: Evaluation, unit: str) -> str:
    """Return an evaluation's tables of accuracies and costs as text."""
    head, *rows = cost_table(evaluation.costs, unit, evaluation.speeds)
    tables = format_tables(evaluation.results, evaluation.datasets)
    return f"{tables}\n\n{format_table(head, rows)}"


def cost_table(
    costs: Mapping[str, Mapping[str, float]], unit: str, speeds: Mapping[int, Mapping[str, float]] = {}
) -> list[list[str]]:
    """Return the head and the rows of a table of each model's size, GFLOP and speed."""
    head = ["", "M parameters", "MB in float32", f"GFLOP/{unit}", *(f"{unit}s/s, batch {size}" for size in speeds)]
    rows = []
    for name, cost in costs.items():
        millions = cost["num_parameters"] / 1e6
        rates = [f"{rates[name]:.1f}" if name in rates else "–" for rates in speeds.values()]
        rows.append([name, f"{millions:.2f}", f"{4 * millions:.1f}", f"{cost['gflop']:.2f}", *rates])
    return [head, *rows]


def percent(interval: Interval, decimals: int = 1) -> str:
    """Return an interval in %, such as "50.0 [48.1, 52.3]"."""
    value, low, high = (f"{100 * share:.{decimals}f}" for share in interval)
    return f"{value} [{low}, {high}]"


def study_table(logs: Mapping[str, Log]) -> str:
    """Return a table with a row for each run: top-1 accuracies and teacher gap closed on ``DATASET``, loss, and time.

    The loss is the mean of the last 100 logged values. The time is the training time in seconds, without evaluations.

    Args:
        logs: Name of a run → log; the first run must have measured the untrained student and the teacher.
    """
    first = next(iter(logs.values()))
    names = [name for name in (*RAW_EMBEDDINGS, EMBEDDING) if _top1(first, name) != "–"]
    lines = [[UNTRAINED, *(_top1(first, name, step=0) for name in names)]]
    for run, log in logs.items():
        has_own = _top1(log, names[0], TEACHER) != "–"
        cells = []
        for name in names:
            closed = gap_closed_by_step(log, DATASET, name, baselines=log if has_own else first)
            cells.append(f"{_top1(log, name)} ({f'{100 * closed[max(closed)]:.0f} %' if closed else '–'})")
        losses, paces = log["loss/train/total"], log.get("throughput/samples_per_sec", {}).values()
        loss = mean(losses[step] for step in sorted(losses)[-100:])
        seconds = f"{max(log['time/sample'].values()) * mean(1 / pace for pace in paces):.0f}" if paces else "–"
        lines.append([run, *cells, f"{loss:.3f}", seconds])
        if has_own and log is not first:
            lines.append([f"– its {UNTRAINED}", *(_top1(log, name, step=0) for name in names)])
            lines.append([f"– its {TEACHER}", *(_top1(log, name, TEACHER) for name in names)])
    lines.append([TEACHER, *(_top1(first, name, TEACHER) for name in names)])
    return format_table(["bank train / bank test", *names, "loss", "s"], lines, "github")


def _top1(log: Log, embedding: str, row: str = STUDENT, step: int | None = None) -> str:
    values = [log.get(metric_key(DATASET, retrieval_from(bank, 1), embedding, row), {}) for bank in BANKS]
    steps = [max(curve, default=0) if step is None else step for curve in values]
    return " / ".join(f"{100 * curve[at]:.1f}" for curve, at in zip(values, steps, strict=True) if at in curve) or "–"
