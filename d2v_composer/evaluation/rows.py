"""Define the rows, columns and log keys of an evaluation, and make tables of its results with their uncertainty.

Shapes: Q queries, K neighbors.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from statistics import mean
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2v_composer.checkpoints.checkpoint import Measure, Result
from d2v_composer.evaluation.nearest_neighbors import NUM_COMMON, NUM_NEIGHBORS
from d2v_composer.evaluation.run_log import Log

BANKS = ("train", "test")
VIEWS = ("first view", "second view")
UNTRAINED, STUDENT, TEACHER = GAP = ("untrained student", "student", "teacher")
"""The models between which the teacher gap lies; agreement compares with the teacher."""
GAP_CLOSED = "teacher gap closed"
PROJECTED_GAP = tuple(f"{model}, projected" for model in GAP)
"""Rows of the same models in the teacher's space: students' mapped embeddings, and the teacher's embedding itself."""
GAPS = {GAP_CLOSED: GAP, f"{GAP_CLOSED}, projected": PROJECTED_GAP}
NUM_RESAMPLES = 2000
Hits = NDArray[np.bool_ | np.float64]
"""A model's result for each query, (Q,): True if the query is right, or a share from 0 to 1."""


class Row(NamedTuple):
    """A row of tables: the queries of a model, looked up in the embeddings of the same or of another model."""

    title: str
    """The row's name in tables, plots and reports."""
    key: str
    """The row's part of a log key; '' for the student, before and after its training."""
    color: str
    """The color of the row in plots over training, as matplotlib names it; '' for none."""
    queries: str
    """The model that embeds the queries."""
    bank: str
    """The model that embeds the bank."""
    is_projected: bool = False
    """True if the embeddings are in the teacher's space: a student's ``projected_cls``, or the teacher's embedding to
    which it is fitted."""

    @property
    def changes_in_training(self) -> bool:
        """True for a row that a run measures again and again; the others are measured once."""
        return not {UNTRAINED, STUDENT}.isdisjoint((self.queries, self.bank))


def row_of(model: str, color: str = "") -> Row:
    """Return the row of a model's queries in its own bank; its log key has the model's name, except for the student."""
    return Row(model, "" if model in (UNTRAINED, STUDENT) else model, color, model, model)


# Student → the color of its rows in the teacher's space.
STUDENTS = {UNTRAINED: "", STUDENT: "C4"}
ROWS = {
    row.title: row
    for row in (
        row_of("pixels", "C2"),
        row_of("log_mel", "C2"),
        row_of("encoder", "C3"),
        row_of(UNTRAINED),
        row_of(STUDENT, "C0"),
        row_of(TEACHER, "C1"),
        *(Row(f"{model}, projected", "projected", color, model, model, True) for model, color in STUDENTS.items()),
        Row(f"{TEACHER}, projected", "teacher_projected", "", TEACHER, TEACHER, True),
        *(
            Row(f"{model} in the teacher's index", "in_teacher_index", color, model, TEACHER, True)
            for model, color in STUDENTS.items()
        ),
    )
}
"""Title → row, in the order of tables."""


def rows_of(models: Collection[str], target: str = "") -> list[Row]:
    """Return the rows that can be measured with some models: those of ``ROWS``, then one row for each further model.

    Args:
        models: Names of the models.
        target: Name of the teacher's embedding to which the student's is mapped; '' for no map.
    """
    known = [row for row in ROWS.values() if {row.queries, row.bank} <= {*models} and (target or not row.is_projected)]
    return known + [row_of(model) for model in models if model not in ROWS]


def retrieval_from(bank: str, k: int) -> Measure:
    """Return the measure of retrieval: a query is a hit if any of its k nearest in the bank has the query's label.

    Args:
        bank: A split; ``classes``, for the text embeddings of the classes; or the second of ``VIEWS``, for a second
            view of each test image, where the label is the image's number.
        k: The number of neighbors.
    """
    if bank in BANKS:
        return Measure(bank, "retrieval", k, f"bank_{bank}/top{k}", f"bank {bank} top-{k}")
    if bank == "classes":
        return Measure(bank, "zero_shot", k, f"zero_shot/top{k}", f"zero-shot top-{k}")
    return Measure("", "instance", k, f"instance/top{k}", f"instance top-{k}")


KNN = Measure("train", "knn", NUM_NEIGHBORS, "knn/top1", "20-NN weighted")
KNN_MAJORITY = Measure("train", "knn_majority", NUM_NEIGHBORS, "knn_majority/top1", "20-NN majority")
LINEAR = Measure("train", "linear", None, "linear/top1", "linear probe")
AGREEMENT = Measure("", "agreement", NUM_COMMON, "agreement@10", "neighbor agreement")
# Name in a config → its measures, or a function that returns the measure for each k of a retrieval.
PROBES: Mapping[str, Sequence[Measure] | Callable[[int], Measure]] = {
    "knn": (KNN, KNN_MAJORITY),
    "linear": (LINEAR,),
    "agreement": (AGREEMENT,),
    "instance": partial(retrieval_from, VIEWS[1]),
    "zero_shot": partial(retrieval_from, "classes"),
}
WITHOUT_LABELS = ("agreement", "instance")
# The title of a table → its measures.
TABLES = {
    "Zero-shot retrieval": ("retrieval",),
    "Probes fitted on train, measured on test": ("knn", "knn_majority", "linear"),
    "Zero-shot classification of test by text embeddings of the classes": ("zero_shot",),
    "Measured without labels": WITHOUT_LABELS,
}


def measures_of(ks: Sequence[int], probes: Iterable[str], has_labels: bool = True) -> list[Measure]:
    """Return the measures of a set: retrieval, then the probes; for a set without labels, those that need no labels."""
    measures = [retrieval_from(bank, k) for bank in BANKS for k in ks if has_labels]
    for probe in map(PROBES.__getitem__, probes if has_labels else WITHOUT_LABELS):
        measures += map(probe, ks) if callable(probe) else probe
    return measures


def metric_key(dataset: str, measure: Measure, embedding: str = "", row: str = STUDENT) -> str:
    """Return the log key of an accuracy; by default, the key of the student's accuracy in the primary embedding."""
    key = ROWS[row].key if row in ROWS else row
    return "/".join(filter(None, ["metrics", dataset, key, measure.key, embedding]))


def last_batch(results: Iterable[Result]) -> int:
    """Return the batch after which a run last measured its student; 0 if it did not."""
    return max((result.batch for result in results if result.row == STUDENT), default=0)


class Interval(NamedTuple):
    """An estimate with its 95 % percentile interval over resampled queries (Efron 1979)."""

    value: float
    low: float
    high: float
    note: str = ""
    """How many resamples are left out, in parentheses; '' for none."""


def pivot(results: Iterable[Result], dataset: str) -> dict[Measure, dict[str, Interval | None]]:
    """Return measure → row → accuracy on a data set, in each row's primary embedding; further rows follow ``ROWS``.

    The last rows are the teacher gaps closed, :data:`GAPS`: ``None`` if there is no gap, and left out if one of the
    three models was not measured.
    """
    columns: dict[Measure, dict[str, Hits]] = {}
    for result in sorted(results, key=lambda result: (*ROWS, result.row).index(result.row)):
        if result.dataset == dataset and result.is_primary:
            columns.setdefault(result.measure, {})[result.row] = result.hits.numpy()
    return {
        measure: {row: accuracy_interval(hits) for row, hits in rows.items()}
        | {
            gap: gap_closed_interval(*(rows[row] for row in models))
            for gap, models in GAPS.items()
            if rows.keys() >= {*models}
        }
        for measure, rows in columns.items()
    }


def accuracy_interval(hits: Hits) -> Interval:
    """Return the mean of the queries' hits, fractions or differences of hits, (Q,), with its interval."""
    return Interval(float(hits.mean()), *np.percentile(resample(hits), [2.5, 97.5]).tolist())


def gap_closed_interval(*hits: Hits) -> Interval | None:
    """Return the teacher gap closed with its interval, ``None`` for no gap, from the three models' hits, (Q,) each."""
    value, *resampled = (gap_closed(*accuracies) for accuracies in ([array.mean() for array in hits], *resample(*hits)))
    if value is None:
        return None
    low, high = np.percentile([closed for closed in resampled if closed is not None], [2.5, 97.5]).tolist()
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
        embedding: Name of the embedding, the same for student and teacher.
        k: The k of top-k.
        baselines: The log with the untrained student (``retrieval.at_start``) and the teacher
            (``retrieval.baselines``); default ``log``.

    Returns:
        Empty if untrained student or teacher is missing, or if there is no gap in either bank.
    """
    values: dict[int, list[float]] = {}
    for bank in BANKS:
        options = dataset, retrieval_from(bank, k), embedding
        untrained, _, teacher = ((baselines or log).get(metric_key(*options, row), {}) for row in GAP)
        for step, accuracy in log.get(metric_key(*options), {}).items() if 0 in untrained and teacher else ():
            closed = gap_closed(untrained[0], accuracy, teacher[max(teacher)])
            if closed is not None:
                values.setdefault(step, []).append(closed)
    return {step: mean(values[step]) for step in sorted(values)}


def resample(*hits: Hits) -> NDArray[np.float64]:
    """Return the accuracies of S models in each bootstrap resample of their common queries, (R, S).

    Queries that the same models get right are interchangeable, so only the number of queries of each kind is drawn.

    Args:
        hits: Hits of each model, (Q,) each.
    """
    kinds, counts = np.unique(np.stack(hits, axis=1), axis=0, return_counts=True)
    num_queries = counts.sum()
    drawn = np.random.default_rng(0).multinomial(num_queries, counts / num_queries, size=NUM_RESAMPLES)
    return drawn @ kinds / num_queries
