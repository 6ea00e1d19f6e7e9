"""Define the rows of an evaluation's tables, and the log keys of accuracies."""

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from d2v_composer.evaluation.metrics.metric import Column
from d2v_composer.models.alignment import EmbeddingInfo
from d2v_composer.models.names import EMBEDDING

UNTRAINED, STUDENT, TEACHER = GAP = ("untrained student", "student", "teacher")
"""The teacher gap is the difference between the accuracies of the teacher and of the untrained student."""
IN_INDEX = "in the teacher's index"
GAP_CLOSED = "teacher gap closed"


class Side(NamedTuple):
    """The queries or the bank of a row: the names of a model and of one of the model's embeddings."""

    model: str
    embedding: str = ""
    """Name of the embedding; '' for the embedding that tables show."""


class Row(NamedTuple):
    """A row of tables: a model that embeds the queries, and the same or another model that embeds the bank."""

    title: str
    """The row's name in tables, plots and reports."""
    key: str
    """The row's part of a log key; '' for the untrained and the trained student."""
    color: str
    """Matplotlib's color for the row in plots over training; '': the plots omit the row."""
    queries: Side
    bank: Side

    @property
    def models(self) -> set[str]:
        return {self.queries.model, self.bank.model}

    @property
    def changes_in_training(self) -> bool:
        """True if the untrained or the trained student is a model of the row."""
        return not self.models.isdisjoint((UNTRAINED, STUDENT))

    def is_measurable(self, models: Collection[str], infos: Mapping[str, EmbeddingInfo]) -> bool:
        """Return True if the row's models are given and, for a row of two models, the embeddings are in one space.

        Args:
            models: Names of the models.
            infos: Name of a model → description of the model's embedding, if known.
        """
        if not self.models <= {*models}:
            return False
        if len(self.models) == 1:
            return True
        if not self.models <= infos.keys():
            return False
        return infos[self.queries.model].is_in_space_of(infos[self.bank.model])

    def sides(
        self, names: Collection[str], headline: str, info: EmbeddingInfo | None
    ) -> Iterator[tuple[Side, Side, bool]]:
        """Yield, for each embedding of the row, the queries, the bank, and True if tables show the embedding.

        Args:
            names: Names of the embeddings of the model that embeds the queries.
            headline: Name of the embedding that tables show.
            info: Description of the embedding of the model that embeds the queries, if known.
        """
        if self.queries.embedding:
            yield self.queries, self.bank, True
            return
        chosen = find_headline(headline, names, info)
        for name in names:
            if name == EMBEDDING != chosen and info is not None and info.made_by == "raw":
                continue  # another name of a raw embedding
            side = self.queries._replace(embedding=name)
            yield side, side, name == chosen


def find_headline(headline: str, names: Collection[str], info: EmbeddingInfo | None) -> str:
    """Return the name of the embedding that tables show for a model: ``headline`` or, if missing, a replacement."""
    of = info.of if info is not None and headline == EMBEDDING else headline
    for name in (headline, of, of.replace("layer_mean", "output"), "output_cls", "output_mean"):
        if name in names:
            return name
    if len(names) == 1:
        return next(iter(names))
    raise ValueError(f"headline must be one of {', '.join(names)}, got {headline!r}")


def row_of(model: str, color: str = "") -> Row:
    """Return the row of a model that embeds queries and bank."""
    return Row(model, "" if model in (UNTRAINED, STUDENT) else model, color, Side(model), Side(model))


# Colors that color-blind people can tell apart (Okabe and Ito 2008).
BLUE, SKY, VERMILION, GREEN, GRAY = "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#999999"
ROWS = {
    row.title: row
    for row in (
        row_of("pixels", GRAY),
        row_of("log_mel", GRAY),
        row_of("encoder", GREEN),
        row_of(UNTRAINED),
        row_of(STUDENT, BLUE),
        Row(IN_INDEX, "in_index", SKY, Side(STUDENT, EMBEDDING), Side(TEACHER, EMBEDDING)),
        row_of(TEACHER, VERMILION),
    )
}
"""Title → row, in the order of tables."""


def rows_of(models: Collection[str], infos: Mapping[str, EmbeddingInfo] = {}) -> list[Row]:
    """Return the rows that can be measured with the given models, in the order of tables."""
    known = [row for row in ROWS.values() if row.is_measurable(models, infos)]
    return known + [row_of(model) for model in models if model not in ROWS]


def metric_key(dataset: str, column: Column, embedding: str = "", row: str = STUDENT) -> str:
    """Return the log key of an accuracy; by default, of the student's accuracy in tables."""
    key = ROWS[row].key if row in ROWS else row
    return "/".join(filter(None, ["metrics", dataset, key, column.key, embedding]))
