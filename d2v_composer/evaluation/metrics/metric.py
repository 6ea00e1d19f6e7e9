"""Metrics: a metric has a name, what it needs, its columns of tables, and a function from embeddings to hits.

Shapes: Q queries, N bank samples, K neighbors, D channels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from d2v_composer.evaluation.nearest_neighbors import TopK, retrieval_hits

BANKS = ("train", "test")
VIEWS = ("first view", "second view")
"""Names of the parts that hold two augmentations of each test sample."""
CLASSES = "classes"
"""Name of the part that holds the text embeddings of a set's classes."""


class Table(NamedTuple):
    """A table and a plot, for metrics that answer one question."""

    name: str
    """The beginning of the plot's file name."""
    title: str
    """The beginning of the table's title."""
    question: str
    """The title of the plot, in which {unit} stands for the samples' unit."""


class Column(NamedTuple):
    """A number that a metric gives for each query: a column of tables."""

    metric: str
    """Name of the metric."""
    bank: str
    """The split that is searched, or to which a classifier is fitted; ``classes`` for text embeddings of the classes;
    '' for the test samples among themselves."""
    name: str
    """Name in files."""
    k: int | None
    """The number of neighbors that are used; ``None`` for a classifier."""
    key: str
    """The column's part of a log key."""
    heading: str


@dataclass
class Pair:
    """The embeddings of the queries and of the bank, of one model or of two, in all parts of a set.

    A part is 'train', 'test', one of :data:`VIEWS` of test, or ``classes``, which only the bank has.
    """

    queries: Callable[[str], Tensor]
    """Returns a part's embeddings, (Q, D), on the device."""
    bank: Callable[[str], Tensor]
    """Returns a part's embeddings in the bank, (N, D), on the device."""
    labels: Callable[[str], Tensor]
    """Returns the label of each sample of a part; a view's label is the index of its sample."""
    search: Callable[[Tensor, Tensor, int], TopK]
    """Returns the k nearest bank samples of each query, given the bank, (N, D), the queries, (Q, D), and k."""
    teacher: Callable[[], Tensor]
    """Returns the indices of each test sample's K nearest other test samples in the teacher's embedding, (Q, K)."""
    widths: Mapping[str, int] = field(default_factory=dict)
    """Bank → the largest number of neighbors that any metric asks for."""
    title: str = ""
    """Name of the pair in a warning; '' for no warnings."""
    found: dict[tuple[str, str], TopK] = field(default_factory=dict)

    def nearest(self, bank: str, queries: str, k: int) -> TopK:
        """Return the k bank samples nearest to each query, given the parts of both, (Q, k); all of a smaller bank.

        The result of a search is kept for all metrics.
        """
        nearest = self.found.get((bank, queries))
        if nearest is None or nearest.indices.shape[1] < k:
            in_bank = self.bank(bank)
            k_of_search = min(max(k, self.widths.get(bank, 0)), len(in_bank))
            self.found[bank, queries] = nearest = self.search(in_bank, self.queries(queries), k_of_search)
        return TopK(*(tensor[:, :k] for tensor in nearest))


class Metric(NamedTuple):
    """A metric of embeddings; :data:`~d2v_composer.evaluation.metrics.METRICS` lists all."""

    name: str
    """Name in ``retrieval.probes`` of a YAML."""
    about: str
    """What the metric does, after its name in the description of ``retrieval.probes``."""
    table: Table
    needs: frozenset[str]
    """What the metric needs: any of ``labels``, ``teacher``, ``texts`` (embeddings of the classes) and ``views``."""
    columns: Callable[[Sequence[int], Mapping[str, int]], list[Column]]
    """Returns the columns, given the numbers of neighbors that a YAML asks for (``ks``) and the size of each bank."""
    hits: Callable[[Pair, Sequence[Column]], Iterable[Tensor]]
    """Returns for each column the hits of the queries: (Q,) bool, or float64 shares from 0 to 1."""


def hits_at(pair: Pair, bank: str, queries: str, columns: Sequence[Column]) -> list[Tensor]:
    """Return for each column whether any of a query's k nearest bank samples has the query's label, (Q,) bool."""
    ks = [column.k or 0 for column in columns]
    nearest = pair.nearest(bank, queries, max(ks)).indices
    return retrieval_hits(nearest, pair.labels(bank), pair.labels(queries), ks)
