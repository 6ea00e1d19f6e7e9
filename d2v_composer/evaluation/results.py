"""Results of an evaluation, their intervals, and the fraction of the teacher gap that a student closes.

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
"""The hit of each query, (Q,): a bool, or a share from 0 to 1."""


class Result(NamedTuple):
    """The measurement of one embedding of a table's row, in one column, on one data set."""

    row: str
    """Title of the row."""
    dataset: str
    column: Column
    embedding: str
    """Name of the queries' embedding; '' if the model does not name the embedding."""
    info: EmbeddingInfo
    """Description of the queries' embedding."""
    is_headline: bool
    """True if tables show the result."""
    hits: Tensor
    """The hit of each query, (Q,) bool or, for neighbor agreement, the share of common neighbors, (Q,) float64; on the
    host."""
    weights: str = ""
    """Hash of the weights of the model that embeds the queries; '' if no hash is known."""
    batch: int = 0
    """Number of training batches before a measurement during training; 0 for a measurement outside training."""
    nearest: Tensor | None = None
    """For each test sample, the indices of its K nearest train samples or, in a set without labels, of its K nearest
    other test samples, nearest first, (Q, K) int32; ``None`` if the indices are not kept."""

    @property
    def accuracy(self) -> float:
        """The mean of the hits, from 0 to 1."""
        return self.hits.double().mean().item()

    @property
    def interval(self) -> "Interval":
        """The accuracy with its 95 % interval."""
        return accuracy_interval(self.hits.numpy())

    def plain(self) -> dict[str, Any]:
        """Return the fields as a dict, from which :func:`read_results` restores the result."""
        return self._asdict() | {"column": self.column._asdict(), "info": self.info._asdict()}

    @property
    def embedding_text(self) -> str:
        """The embedding in words, such as "the teacher's output_cls"."""
        return self.info.in_words(self.embedding)


def read_results(saved: Iterable[Mapping[str, Any]]) -> list[Result]:
    """Return the results, given :meth:`Result.plain` of each."""
    return [
        Result(**{**fields, "column": Column(**fields["column"]), "info": EmbeddingInfo(**fields["info"])})
        for fields in saved
    ]


def last_batch(results: Iterable[Result]) -> int:
    """Return the greatest ``batch`` of the student's results; 0 without results of the student."""
    return max((result.batch for result in results if result.row == STUDENT), default=0)


def pivot(results: Iterable[Result], dataset: str) -> dict[Column, dict[str, Result]]:
    """Return column → title of a row → result, for the results that tables show for a data set.

    The rows of a column are in the order of tables.
    """
    columns: dict[Column, dict[str, Result]] = {}
    for result in sorted(results, key=lambda result: (*ROWS, result.row).index(result.row)):
        if result.dataset == dataset and result.is_headline:
            columns.setdefault(result.column, {})[result.row] = result
    return columns


def heading(texts: Mapping[str, str]) -> str:
    """Return the embedding that a table's title names, in words; '' if the title names no embedding.

    Args:
        texts: Title of a row → the row's embedding in words; '' for an embedding without a name.
    """
    return next((texts[row] for row in (*GAP[::-1], *texts) if texts.get(row)), "")


def label(row: str, text: str, of_table: str) -> str:
    """Return a row's title, with the row's embedding in parentheses if the table's title names another embedding.

    Args:
        row: Title of the row.
        text: The row's embedding in words; '' for an embedding without a name.
        of_table: The embedding that the table's title names, in words.
    """
    return row if text in ("", of_table) else f"{row} ({'raw' if text.startswith('raw ') else text})"


class Interval(NamedTuple):
    """An estimate and its 95 % interval, from bootstrap resamples of the queries (Efron 1979)."""

    value: float
    low: float
    high: float


def accuracy_interval(hits: Hits) -> Interval:
    """Return the mean of the hits of Q queries, with the mean's 95 % interval."""
    return Interval(float(hits.mean()), *np.percentile(resample(hits), [2.5, 97.5]).tolist())


def are_comparable(*results: Result) -> bool:
    """Return True if the results of several models can be compared.

    The data set, the column, the number of queries and the name of the embedding must be the same for all results. All
    embeddings that are not the teacher's own must have the same ``made_by``. All embeddings whose ``made_by`` is not
    ``raw`` must be in the same space.
    """
    ways = {result.info.made_by for result in results} - {"teacher"}
    places = {(result.dataset, result.column, len(result.hits)) for result in results}
    embeddings = {(result.embedding, result.info.of) for result in results}
    spaces = {result.info.space for result in results if result.info.made_by != "raw"}
    return max(map(len, (ways, places, embeddings, spaces))) == 1


class GapClosed(NamedTuple):
    """The fraction of the teacher gap, the teacher's lead over the untrained student, that the student closes."""

    interval: Interval | None
    """The fraction with its interval; ``None`` if the interval is not narrower than ``WIDEST``, or if the teacher is
    not clearly better than the untrained student."""
    queries_needed: int = 0
    """If there are too few queries for an interval, roughly the number of queries that would be enough; else 0."""


def gap_closed(cells: Mapping[str, Result]) -> GapClosed | None:
    """Return the fraction of the teacher gap that the student closes in a column.

    Args:
        cells: Title of a row → result in the column.

    Returns:
        ``None`` if results of the untrained student, the student or the teacher are missing or not comparable.
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
    """Return the fraction of the teacher gap that the student closes in top-k retrieval, after each measurement.

    The fraction is the mean over the banks with a teacher gap above 0.

    Args:
        log: Log of the student's run.
        dataset: Name of the data set.
        embedding: Name of the embedding; '' for the embedding that tables show.
        k: Number of neighbors.
        baselines: Log with the accuracies of the untrained student and of the teacher; default: ``log``.

    Returns:
        Number of training batches → fraction; empty if no bank has a teacher gap above 0.
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

    Args:
        hits: Hits of each model, (Q,) each.
    """
    # Queries with the same hits are interchangeable, so only their number is drawn.
    kinds, counts = np.unique(np.stack(hits, axis=1), axis=0, return_counts=True)
    num_queries = counts.sum()
    drawn = np.random.default_rng(0).multinomial(num_queries, counts / num_queries, size=NUM_RESAMPLES)
    return drawn @ kinds / num_queries
