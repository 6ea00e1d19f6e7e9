"""Define the rows of an evaluation, and the log keys of its numbers."""

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from d2v_composer.evaluation.metrics.metric import Column
from d2v_composer.models.names import EMBEDDING, find_primary

UNTRAINED, STUDENT, TEACHER = GAP = ("untrained student", "student", "teacher")
"""The models between which the teacher gap lies; agreement compares with the teacher."""
GAP_CLOSED = "teacher gap closed"
PROJECTED_GAP = tuple(f"{model}, projected" for model in GAP)
"""Rows of the same models in the teacher's space: students' mapped embeddings, and the teacher's embedding itself."""
GAPS = {GAP_CLOSED: GAP, f"{GAP_CLOSED}, projected": PROJECTED_GAP}
TARGET = "target"
"""Stands for the teacher's embedding to which the student's is mapped."""


class Side(NamedTuple):
    """The embeddings of a row's queries, or of its bank."""

    model: str
    embedding: str = ""
    """Name of the embedding; '' for the primary one and each other one."""


class Row(NamedTuple):
    """A row of tables: a model's queries, looked up in the embeddings of the same or of another model."""

    title: str
    """The row's name in tables, plots and reports."""
    key: str
    """The row's part of a log key; '' for the student, before and after its training."""
    color: str
    """The color of the row in plots over training, as matplotlib names it; '' for none."""
    queries: Side
    bank: Side

    @property
    def models(self) -> set[str]:
        return {self.queries.model, self.bank.model}

    @property
    def changes_in_training(self) -> bool:
        """True for a row that a run measures again and again; the others are measured once."""
        return not self.models.isdisjoint((UNTRAINED, STUDENT))

    def is_measurable(self, models: Collection[str], target: str) -> bool:
        """Return whether the row can be measured, given the models and the teacher's embedding of the map, if any."""
        return self.models <= {*models} and bool(target or not self.queries.embedding)

    def sides(
        self, names: Mapping[str, Collection[str]], primary: str, target: str
    ) -> Iterator[tuple[Side, Side, Side, bool]]:
        """Yield queries, bank, the teacher's embedding to compare with, and whether they are the row's primary ones.

        Args:
            names: Model → names of its embeddings.
            primary: The primary embedding.
            target: The teacher's embedding to which the student's is mapped; '' for no map.
        """
        in_queries, of_teacher = names[self.queries.model], names.get(TEACHER, ())
        if self.queries.embedding:
            queries, bank = (
                side._replace(embedding=target) if side.embedding == TARGET else side
                for side in (self.queries, self.bank)
            )
            if queries.embedding in in_queries:  # an untrained student's may be missing
                yield queries, bank, Side(TEACHER, target), True
            return
        headline, has_projected_row = find_primary(primary, in_queries), target and self.changes_in_training
        for name in in_queries:
            if name == headline or name != EMBEDDING or not has_projected_row:
                is_same = name in of_teacher and name != headline
                reference = name if is_same else primary
                side = self.queries._replace(embedding=name)
                yield side, side, Side(TEACHER, reference), name == headline


def row_of(model: str, color: str = "") -> Row:
    """Return the row of a model's queries in its own bank; its log key has the model's name, except for the student."""
    return Row(model, "" if model in (UNTRAINED, STUDENT) else model, color, Side(model), Side(model))


def _projected(title: str, key: str, color: str, queries: str, bank: str) -> Row:
    sides = [Side(model, TARGET if model == TEACHER else EMBEDDING) for model in (queries, bank)]
    return Row(title, key, color, *sides)


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
        *(_projected(f"{model}, projected", "projected", color, model, model) for model, color in STUDENTS.items()),
        _projected(f"{TEACHER}, projected", "teacher_projected", "", TEACHER, TEACHER),
        *(
            _projected(f"{model} in the teacher's index", "in_teacher_index", color, model, TEACHER)
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
    known = [row for row in ROWS.values() if row.is_measurable(models, target)]
    return known + [row_of(model) for model in models if model not in ROWS]


def metric_key(dataset: str, column: Column, embedding: str = "", row: str = STUDENT) -> str:
    """Return the log key of an accuracy; by default, the key of the student's accuracy in the primary embedding."""
    key = ROWS[row].key if row in ROWS else row
    return "/".join(filter(None, ["metrics", dataset, key, column.key, embedding]))
