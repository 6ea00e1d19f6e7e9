"""Describe metrics of embeddings, and the embeddings to measure.

Shapes: Q queries, N bank samples, K neighbors, D channels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from d2v_composer.evaluation.nearest_neighbors import TopK, retrieval_hits

BANKS = ("train", "test")
VIEWS = ("first view", "second view")
"""Names of the parts that hold the first and the second augmented view of each test sample."""
CLASSES = "classes"
"""Name of the part that holds the text embeddings of a set's classes."""


class Table(NamedTuple):
    """The table and the plots of one or more metrics."""

    name: str
    """The beginning of the plots' file names."""
    title: str
    """The beginning of the table's title."""
    question: str
    """The first line of the plots' titles, in which {unit} stands for the name of the samples, such as images."""


class Column(NamedTuple):
    """A column of a table, with one measure of a metric."""

    metric: str
    """Name of the metric."""
    bank: str
    """The split that is searched or to which a classifier is fitted, ``train`` or ``test``; ``classes`` for the text
    embeddings of the classes; '' for neighbor agreement and instance retrieval."""
    name: str
    """Name of the column's measure in an evaluation's files."""
    k: int | None
    """Number of neighbors; ``None`` for the linear probe."""
    key: str
    """The column's part of a log key."""
    heading: str


@dataclass
class Pair:
    """The embeddings of a set's parts as queries and as a bank, from one model or from two.

    A part is ``train``, ``test``, one of :data:`VIEWS` or, in the bank alone, :data:`CLASSES`.
    """

    queries: Callable[[str], Tensor]
    """Returns a part's embeddings as queries, (Q, D), on the device."""
    bank: Callable[[str], Tensor]
    """Returns a part's embeddings as a bank, (N, D), on the device."""
    labels: Callable[[str], Tensor]
    """Returns a part's labels, (N,) int, on the device; the labels of views and of text embeddings are 0, 1, 2, …."""
    search: Callable[[Tensor, Tensor, int], TopK]
    """Returns the k nearest bank samples of each query, given the bank, (N, D), the queries, (Q, D), and k."""
    teacher: Callable[[], Tensor]
    """Returns the indices of each test sample's K nearest other test samples in the teacher's embedding, (Q, K)."""
    widths: Mapping[str, int] = field(default_factory=dict)
    """Bank → largest number of neighbors that a metric needs."""
    title: str = ""
    """Name of the pair in warnings; '': no warnings."""
    found: dict[tuple[str, str], TopK] = field(default_factory=dict)

    def nearest(self, bank: str, queries: str, k: int) -> TopK:
        """Return the k nearest bank samples of each query, (Q, k), or all samples of a bank with fewer than k.

        Args:
            bank: Name of the part that is searched.
            queries: Name of the part whose samples are the queries.
            k: Number of neighbors.
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
    about: str
    """The rest of a sentence that begins with the metric's name, for the description of a YAML's ``probes``."""
    table: Table
    needs: frozenset[str]
    """What the metric needs: any of ``labels``, ``teacher``, ``texts`` (class embeddings) and ``views``."""
    columns: Callable[[Sequence[int], Mapping[str, int]], list[Column]]
    """Returns the columns, given the numbers of neighbors for top-k accuracies and the size of each bank, if known."""
    hits: Callable[[Pair, Sequence[Column]], Iterable[Tensor]]
    """Returns for each column the hits of the queries: (Q,) bool, or float64 shares from 0 to 1."""


def hits_at(pair: Pair, bank: str, queries: str, columns: Sequence[Column]) -> list[Tensor]:
    """Return for each column whether any of a query's k nearest bank samples has the query's label, (Q,) bool."""
    ks = [column.k or 0 for column in columns]
    nearest = pair.nearest(bank, queries, max(ks)).indices
    return retrieval_hits(nearest, pair.labels(bank), pair.labels(queries), ks)
