"""Compute an evaluation's results from every model's embeddings of a set.

Shapes: N samples of a part of the set (``train``, ``test``, a view or the classes), Q queries, K neighbors, D channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from d2v_composer.evaluation.embedded_set import EmbeddedSet
from d2v_composer.evaluation.metrics.agreement import AGREEMENT, nearest_others
from d2v_composer.evaluation.metrics.metric import CLASSES, VIEWS, Pair
from d2v_composer.evaluation.metrics.retrieval import RETRIEVAL
from d2v_composer.evaluation.nearest_neighbors import TopK, exact_neighbors
from d2v_composer.evaluation.results import Result
from d2v_composer.evaluation.rows import TEACHER, Row, Side, find_headline
from d2v_composer.evaluation.settings import Settings
from d2v_composer.models.alignment import EmbeddingInfo
from d2v_composer.models.names import EMBEDDING, JOINT
from d2v_composer.sources.labeled import EvaluationSet


def measure(
    rows: Sequence[Row],
    embedded: Mapping[str, EmbeddedSet],
    dataset: str,
    labeled: EvaluationSet,
    settings: Settings,
    infos: Mapping[str, EmbeddingInfo] = {},
    weights: Mapping[str, str] = {},
) -> Iterator[Result]:
    """Yield the results of all rows, the same on every rank.

    Args:
        rows: Rows of tables; each names the model that embeds the queries and the model that embeds the bank.
        embedded: Name of a model → result of :func:`~d2v_composer.evaluation.embedded_set.embed_set` for the set.
        dataset: Name of the set.
        labeled: The set.
        settings: Settings of the evaluation.
        infos: Name of a model → description of the model's embedding, if known.
        weights: Name of a model → hash of the model's weights, if known.
    """
    pairs = PairLoader(embedded, labeled, settings, infos)
    metrics = [(metric, settings.columns(labeled, metric)) for metric in settings.metrics(labeled)]
    for row in rows:
        names, info = embedded[row.queries.model]["test"], infos.get(row.queries.model)
        for queries, bank, is_headline in row.sides(names, settings.headline, info):
            pair = pairs.pair(queries, bank)
            pair.title = f"{dataset}, {row.title}" if is_headline and settings.ranks.rank == 0 else ""
            info_of_queries = pairs.info(queries)
            for metric, columns in metrics:
                if needs_texts := "texts" in metric.needs:  # the texts are the bank, so one row of a model is enough
                    is_measured = queries == bank and pairs.fits_texts(queries, info_of_queries)
                else:
                    is_measured = is_headline or settings.needs_all
                if not is_measured:
                    continue
                for column, hits in zip(columns, metric.hits(pair, columns), strict=True):
                    nearest = None
                    if is_headline and column == columns[0]:
                        if metric is RETRIEVAL:
                            nearest = pair.nearest("train", "test", max(settings.ks)).indices.int().cpu()
                        elif metric is AGREEMENT and not labeled.has_labels:
                            nearest = nearest_others(pair)[:, : max(settings.ks)].int().cpu()
                    about = row.title, dataset, column, queries.embedding, info_of_queries
                    of_model = weights.get(row.queries.model, "")
                    yield Result(*about, is_headline or needs_texts, hits.cpu(), of_model, nearest=nearest)


class PairLoader:
    """Makes pairs of queries and a bank from the models' embeddings of a set."""

    def __init__(
        self,
        embedded: Mapping[str, EmbeddedSet],
        labeled: EvaluationSet,
        settings: Settings,
        infos: Mapping[str, EmbeddingInfo],
    ) -> None:
        self.embedded, self.labeled, self.settings, self.infos = embedded, labeled, settings, infos
        self.widths: dict[str, int] = {}
        for metric in settings.metrics(labeled):
            for column in settings.columns(labeled, metric):
                self.widths[column.bank] = max(self.widths.get(column.bank, 0), column.k or 0)
        self.labels, self.neighbors_of_teacher = cache(self._labels), cache(self._neighbors_of_teacher)

    def pair(self, queries: Side, bank: Side) -> Pair:
        """Return the pair of the given queries and bank."""
        in_queries = cache(partial(self.vectors, queries))
        in_bank = in_queries if bank == queries else cache(partial(self.vectors, bank))
        teacher = partial(self.neighbors_of_teacher, queries.embedding)
        return Pair(in_queries, in_bank, self.labels, self.search, teacher, self.widths)

    def vectors(self, side: Side, part: str) -> Tensor:
        """Return the embeddings of a whole part, (N, D), on the device."""
        settings, classes = self.settings, self.labeled.class_embeddings
        if part == CLASSES and classes is not None:
            return settings.to_device(classes)
        share = settings.to_device(self.embedded[side.model][part][side.embedding])
        return settings.ranks.gather(share, self.labeled.num_samples[part != "train"])

    def search(self, bank: Tensor, queries: Tensor, k: int) -> TopK:
        """Return the k nearest bank samples of each query, (Q, k); the ranks share the search."""
        self.settings.before_batch()
        ranks = self.settings.ranks
        nearest = exact_neighbors(bank, ranks.rows_of_rank(queries), k)
        return TopK(*(ranks.gather(tensor, len(queries)) for tensor in nearest))

    def info(self, side: Side) -> EmbeddingInfo:
        if side.embedding == EMBEDDING and side.model in self.infos:
            return self.infos[side.model]
        return EmbeddingInfo(side.embedding, "raw", self.embedded[side.model]["test"][side.embedding].shape[1], "")

    def fits_texts(self, queries: Side, info: EmbeddingInfo) -> bool:
        """Return True if the queries' embedding can be compared with the class embeddings."""
        classes = self.labeled.class_embeddings
        return (
            queries.embedding == EMBEDDING
            and info.of == JOINT
            and classes is not None
            and classes.shape[1] == info.width
        )

    def _labels(self, part: str) -> Tensor:
        if part in VIEWS or part == CLASSES:
            classes = self.labeled.class_embeddings
            count = len(classes) if part == CLASSES and classes is not None else len(self.labeled.test.labels)
            return self.settings.to_device(torch.arange(count))
        return self.settings.to_device(getattr(self.labeled, part).labels)

    def _neighbors_of_teacher(self, embedding: str) -> Tensor:
        names = self.embedded[TEACHER]["test"]
        if embedding not in names:
            embedding = find_headline(self.settings.headline, names, self.infos.get(TEACHER))
        side = Side(TEACHER, embedding)
        return nearest_others(self.pair(side, side))
