"""Results of an evaluation: hits of each query; accuracies, intervals and the teacher gap closed.

Shapes: Q queries, K neighbors.
"""

import math
from collections.abc import Iterable, Mapping
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from d2v_composer.evaluation.metrics.metric import BANKS, Column
from d2v_composer.evaluation.metrics.retrieval import retrieval_from
from d2v_composer.evaluation.rows import GAP, ROWS, STUDENT, metric_key
from d2v_composer.evaluation.run_log import Log
from d2v_composer.models.alignment import EmbeddingInfo

NUM_RESAMPLES = 2000
# A gap closed is stated if its 95 % interval is narrower than this share of the gap.
WIDEST = 0.5
Hits = NDArray[np.bool_ | np.float64]
"""A model's result for each query, (Q,): True if the query is right, or a share from 0 to 1."""


class Result(NamedTuple):
    """A cell of a table: the hits of one row's embedding, in one column, on one data set."""

    row: str
    """The row's title."""
    dataset: str
    column: Column
    embedding: str
    """Name of the embedding of the queries; '' if it is the only one and has no name."""
    info: EmbeddingInfo
    """Description of this embedding."""
    is_headline: bool
    """True for the embedding that tables show."""
    hits: Tensor
    """Whether each query is right, (Q,) bool, or its share of common neighbors, (Q,) float64; on the host."""
    weights: str = ""
    """Hash of the weights of the model that embeds the queries; '' if it has none."""
    batch: int = 0
    """Number of training batches after which a run measured the row."""
    nearest: Tensor | None = None
    """Indices of the train samples or, without labels, of the other test samples nearest to each test sample, nearest
    first, (Q, K) int32; ``None`` if they are not kept."""

    @property
    def accuracy(self) -> float:
        """The mean of the hits, from 0 to 1."""
        return self.hits.double().mean().item()

    @property
    def interval(self) -> "Interval":
        """The accuracy with its 95 % interval."""
        return accuracy_interval(self.hits.numpy())

    def plain(self) -> dict[str, Any]:
        """Return the fields as plain values, for a checkpoint."""
        return self._asdict() | {"column": self.column._asdict(), "info": self.info._asdict()}

    @property
    def embedding_text(self) -> str:
        """The embedding in words, such as "the teacher's output_cls"."""
        return self.info.in_words(self.embedding)


def read_results(saved: Iterable[Mapping[str, Any]]) -> list[Result]:
    """Return the results whose :meth:`Result.plain` was saved."""
    return [
        Result(**{**fields, "column": Column(**fields["column"]), "info": EmbeddingInfo(**fields["info"])})
        for fields in saved
    ]


def last_batch(results: Iterable[Result]) -> int:
    """Return the batch after which a run last measured its student; 0 if it did not."""
    return max((result.batch for result in results if result.row == STUDENT), default=0)


def pivot(results: Iterable[Result], dataset: str) -> dict[Column, dict[str, Result]]:
    """Return column → row → result, for a data set and the headline; rows that are not in ``ROWS`` come last."""
    columns: dict[Column, dict[str, Result]] = {}
    for result in sorted(results, key=lambda result: (*ROWS, result.row).index(result.row)):
        if result.dataset == dataset and result.is_headline:
            columns.setdefault(result.column, {})[result.row] = result
    return columns


def heading(texts: Mapping[str, str]) -> str:
    """Return the embedding in a table's title, given row → embedding: the teacher's, the student's, or the first."""
    return next((texts[row] for row in (*GAP[::-1], *texts) if texts.get(row)), "")


def label(row: str, text: str, of_table: str) -> str:
    """Return a row's title and, if its embedding ``text`` is another one than the table's, this embedding."""
    return row if text in ("", of_table) else f"{row} ({'raw' if text.startswith('raw ') else text})"


class Interval(NamedTuple):
    """An estimate with its 95 % percentile interval over resampled queries (Efron 1979)."""

    value: float
    low: float
    high: float


def accuracy_interval(hits: Hits) -> Interval:
    """Return the mean of the queries' hits, fractions or differences of hits, (Q,), with its interval."""
    return Interval(float(hits.mean()), *np.percentile(resample(hits), [2.5, 97.5]).tolist())


def are_comparable(*results: Result) -> bool:
    """Return whether results have one data set, column and number of queries, and embeddings of one name and space."""
    ways = {result.info.made_by for result in results} - {"teacher"}
    places = {(result.dataset, result.column, len(result.hits)) for result in results}
    embeddings = {(result.embedding, result.info.of) for result in results}
    spaces = {result.info.space for result in results if result.info.made_by != "raw"}
    return max(map(len, (ways, places, embeddings, spaces))) == 1


class GapClosed(NamedTuple):
    """The fraction of the gap from untrained student to teacher that the student closes."""

    interval: Interval | None
    """``None`` if the fraction is too uncertain to be stated, or if there is no gap."""
    queries_needed: int = 0
    """Approximate number of queries that would be enough, if there are too few; else 0."""


def gap_closed(cells: Mapping[str, Result]) -> GapClosed | None:
    """Return the teacher gap closed in a column; ``None`` if the three models were not measured in one embedding.

    The fraction is stated if the teacher is clearly better than the untrained student, and if the interval of the
    fraction is narrower than ``WIDEST``.
    """
    if not (cells.keys() >= {*GAP} and are_comparable(*(cells[row] for row in GAP))):
        return None  # a resume may change how the embedding is made
    untrained, student, teacher = hits = [cells[row].hits.double().numpy() for row in GAP]
    if (gap := teacher.mean() - untrained.mean()) <= 0:
        return GapClosed(None)
    value = (student.mean() - untrained.mean()) / gap
    resampled = resample(*hits)
    gaps = resampled[:, 2] - resampled[:, 0]
    if np.percentile(gaps, 2.5) > 0:
        low, high = np.percentile((resampled[:, 1] - resampled[:, 0])[gaps > 0] / gaps[gaps > 0], [2.5, 97.5]).tolist()
        if high - low < WIDEST:
            return GapClosed(Interval(float(value), low, high))
    # Both intervals shrink with the root of the number of queries.
    gains = teacher - untrained
    of_gap, of_value = gains.std() / gap, (student - untrained - value * gains).std() / gap
    needed = max(1.96 * of_gap, 2 * 1.96 * of_value / WIDEST) ** 2
    return GapClosed(None, round_up(max(len(untrained) + 1, math.ceil(needed))))


def round_up(number: int) -> int:
    """Round a number up to one significant digit."""
    unit = 10 ** int(math.log10(number))
    return -(-number // unit) * unit


def gap_closed_by_step(
    log: Log, dataset: str, embedding: str = "", k: int = 1, baselines: Log | None = None
) -> dict[int, float]:
    """Return step → teacher gap closed: the mean over both banks, or the value for the only bank with a gap.

    Args:
        log: Log of the student's run.
        dataset: Name of the labeled set.
        embedding: Name of the embedding, the same for student and teacher; '' for the headline.
        k: The k of top-k.
        baselines: The log with the untrained student (``retrieval.at_start``) and the teacher
            (``retrieval.baselines``); default ``log``.

    Returns:
        Training batches → teacher gap closed; empty if the log lacks the untrained student or the teacher, or if
            neither bank has a gap.
    """
    values: dict[int, list[float]] = {}
    for bank in BANKS:
        options = dataset, retrieval_from(bank, k), embedding
        untrained, _, teacher = ((baselines or log).get(metric_key(*options, row), {}) for row in GAP)
        if 0 not in untrained or not teacher or (gap := teacher[max(teacher)] - untrained[0]) <= 0:
            continue
        for step, accuracy in log.get(metric_key(*options), {}).items():
            values.setdefault(step, []).append((accuracy - untrained[0]) / gap)
    return {step: mean(values[step]) for step in sorted(values)}


def resample(*hits: Hits) -> NDArray[np.float64]:
    """Return the accuracies of S models in each of R bootstrap resamples of their common queries, (R, S).

    Queries that the same models get right are interchangeable, so only the number of queries of each kind is drawn.

    Args:
        hits: Hits of each model, (Q,) each.
    """
    kinds, counts = np.unique(np.stack(hits, axis=1), axis=0, return_counts=True)
    num_queries = counts.sum()
    drawn = np.random.default_rng(0).multinomial(num_queries, counts / num_queries, size=NUM_RESAMPLES)
    return drawn @ kinds / num_queries
