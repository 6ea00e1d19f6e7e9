"""Format the results of a run, an evaluation and a study as text tables."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING

from tabulate import tabulate

from d2v_composer.evaluation.evaluate import GAP_CLOSED, Evaluation, Interval, gap_closed_by_step, pivot
from d2v_composer.evaluation.labeled_retrieval import Result, last_batch
from d2v_composer.evaluation.metrics import (
    BANKS,
    ROWS,
    STUDENT,
    TEACHER,
    UNTRAINED,
    Log,
    Measure,
    measures_at,
    metric_key,
    retrieval_from,
)
from d2v_composer.models.names import PROJECTED
from d2v_composer.report.run import EMBEDDINGS, Run

if TYPE_CHECKING:
    from d2v_composer.callbacks.zero_shot_retrieval import ZeroShotRetrieval


CLASSIFIED, UNLABELED = "Zero-shot retrieval", "Measured without labels"
FITTED = "Probes fitted on train, measured on test"
NAMED = "Zero-shot classification of test by text embeddings of the classes"
# The title of a table → what its numbers are.
UNITS = {CLASSIFIED: "accuracy in %", FITTED: "accuracy in %", NAMED: "accuracy in %", UNLABELED: "in %"}
DATASET = "cifar10"


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]], style: str = "plain") -> str:
    """Format a table of at least one row: first column aligned left, the others right, missing cells empty."""
    return tabulate(rows, head, style, stralign="right", colalign=("left",), disable_numparse=True)


def retrieval_table(retrieval: "ZeroShotRetrieval") -> str:
    """Return tables of what a run has measured, as of an evaluation, with the student's last batch."""
    embedding = f"{retrieval.lookup.primary}, batch {last_batch(retrieval.results)}"
    return "\n\n".join(_accuracy_tables(retrieval.results, retrieval.datasets, embedding))


def evaluation_tables(evaluation: Evaluation, each: str) -> str:
    """Return tables of accuracies with intervals, the teacher gap closed, and each model's size and GFLOP.

    Args:
        evaluation: The results.
        each: What a candidate's computation is counted for: image or second.
    """
    candidates = evaluation.candidates
    sizes = list(dict.fromkeys(size for one in candidates for size in one.rates))
    head = ["", "M parameters", "MB in float32", f"GFLOP/{each}", *(f"{each}s/s, batch {size}" for size in sizes)]
    costs = [
        [one.name, f"{millions:.2f}", f"{4 * millions:.1f}", f"{one.gflop:.2f}"]
        + [f"{one.rates[size]:.1f}" if size in one.rates else "–" for size in sizes]
        for one in candidates
        for millions in (one.num_parameters / 1e6,)
    ]
    tables = _accuracy_tables(evaluation.results, evaluation.class_names, evaluation.lookup.primary)
    return "\n\n".join([*tables, format_table(head, costs)])


def _accuracy_tables(results: Sequence[Result], datasets: Iterable[str], embedding: str) -> Iterator[str]:
    """Yield the tables of each data set, with the name of the primary embedding in their titles."""
    for dataset in datasets:
        accuracies = pivot(results, dataset)
        for what, unit in UNITS.items():
            columns = [measure for measure in accuracies if _kind(measure) == what]
            names = dict.fromkeys(row for measure in columns for row in accuracies[measure])
            rows = [[name, *(_percent(accuracies[measure].get(name)) for measure in columns)] for name in names]
            if columns:
                title = f"{what} on {dataset}, {PROJECTED if what == NAMED else embedding}, {unit} [95 % interval]"
                yield f"{title}\n{format_table(['', *(measure.heading for measure in columns)], rows)}"


def run_tables(run: Run) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield each data set's name, with the student's batch, and what the run measured: a head, a row for each model.

    Cells are of the primary embedding, in % with 95 % intervals. The last row is the teacher gap closed.
    """
    for dataset in run.retrieval["datasets"]:
        accuracies, costs = pivot(run.results, dataset), run.record["costs"]
        columns = [measure for measure in measures_at([min(run.retrieval["ks"])]) if measure in accuracies]
        rows = [["", *(each.heading for each in columns), "M parameters", "GFLOP"]]
        for name in (*ROWS, GAP_CLOSED):
            cells = [_percent(accuracies[measure].get(name)) for measure in columns]
            cost = costs.get(STUDENT if name == UNTRAINED else name)
            sizes = [f"{cost['num_parameters'] / 1e6:.2f}", f"{cost['gflop']:.2f}"] if cost else ["", ""]
            if {*cells} - {"–"}:
                rows.append([name, *cells, *sizes])
        if columns:
            yield f"{dataset}, batch {last_batch(run.results)}", rows


def _kind(measure: Measure) -> str:
    kinds = {"": UNLABELED, "classes": NAMED}
    return kinds.get(measure.bank, CLASSIFIED if measure.name == "retrieval" else FITTED)


def _percent(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]{interval.note}"


def study_table(logs: Mapping[str, Log]) -> str:
    """Return a table of each run's top-1 on ``DATASET`` in %, bank train / test, and its teacher gap closed.

    The gap closed is the mean of both banks. The untrained student and the teacher are the first run's, or the run's
    own, which then stand below it. Loss: mean of the last 100 batches; s: seconds of training without evaluations.

    Args:
        logs: Name → log; embeddings that the first run lacks are not shown.
    """
    first = next(iter(logs.values()))
    names = [name for name in EMBEDDINGS if _top1(first, name) != "–"]
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
    """Return top-1 in % with each bank, at a given step or the last one."""
    values = [log.get(metric_key(DATASET, retrieval_from(bank, 1), embedding, row), {}) for bank in BANKS]
    steps = [max(each, default=0) if step is None else step for each in values]
    return " / ".join(f"{100 * each[at]:.1f}" for each, at in zip(values, steps, strict=True) if at in each) or "–"
