"""The rows of an evaluation, its columns and its log keys: what is compared, and by which measures."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from d2v_composer.evaluation.nearest_neighbors import NUM_NEIGHBORS
from d2v_composer.evaluation.without_labels import NUM_COMMON

BANKS = ("train", "test")
VIEWS = ("first view", "second view")
UNTRAINED, STUDENT, TEACHER = GAP = ("untrained student", "student", "teacher")
"""The models between which the teacher gap lies; agreement compares with the teacher."""


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

    @property
    def moves(self) -> bool:
        """True for a row that a run measures again and again; the others are measured once."""
        return not {UNTRAINED, STUDENT}.isdisjoint((self.queries, self.bank))


def row_of(model: str, color: str = "", key: str | None = None) -> Row:
    """Return the row of a model's queries in its own bank; by default, its log key has the model's name."""
    return Row(model, model if key is None else key, color, model, model)


ROWS = {
    row.title: row
    for row in (
        row_of("pixels", "C2"),
        row_of("log_mel", "C2"),
        row_of("encoder", "C3"),
        row_of(UNTRAINED, key=""),
        row_of(STUDENT, "C0", key=""),
        row_of(TEACHER, "C1"),
    )
}
"""Title → row, in the order of tables."""


def rows_of(models: Collection[str]) -> list[Row]:
    """Return the rows that these models allow: those of ``ROWS``, then one row for each further model."""
    known = [row for row in ROWS.values() if {row.queries, row.bank} <= {*models}]
    return known + [row_of(model) for model in models if model not in ROWS]


class Measure(NamedTuple):
    """A measure that scores each query of a data set: a column of tables."""

    bank: str
    """The split that is searched, or that a classifier is fitted to; '' for the test images among themselves, classes
    for text embeddings of the classes."""
    name: str
    k: int | None
    """The number of neighbors; ``None``: a classifier has none."""
    key: str
    """Its part of a log key."""
    heading: str
    """The heading of its column in tables."""


def retrieval_from(bank: str, k: int) -> Measure:
    """Return the measure of retrieval: a query is a hit if any of its k nearest in the bank has its label.

    Args:
        bank: A split; or ``classes``, text embeddings of the classes; or the second of ``VIEWS``, of which each test
            image has one: the label of its first view.
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
# Name in a config → what it measures: DINO's weighted vote of the nearest neighbors and their majority; a classifier;
# the neighbors in common with the teacher; and, for each k of a retrieval, an image's views and its class by text.
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
    """Return the measures of labeled images, retrieval and then the probes; or those that need no labels."""
    measures = [retrieval_from(bank, k) for bank in BANKS for k in ks if has_labels]
    for probe in map(PROBES.__getitem__, probes if has_labels else WITHOUT_LABELS):
        measures += map(probe, ks) if callable(probe) else probe
    return measures


def metric_key(dataset: str, measure: Measure, embedding: str = "", row: str = STUDENT) -> str:
    """Return the log key of an accuracy; by default, that of the student's primary embedding."""
    key = ROWS[row].key if row in ROWS else row
    return "/".join(filter(None, ["metrics", dataset, key, measure.key, embedding]))
