"""Zero-shot retrieval: does one of a query's k nearest bank samples have the query's label?"""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from d2v_composer.evaluation.metrics.metric import BANKS, Column, Metric, Pair, Table, hits_at


def retrieval_from(bank: str, k: int) -> Column:
    """Return the column of top-k retrieval from a bank, ``train`` or ``test``."""
    return Column("retrieval", bank, "retrieval", k, f"bank_{bank}/top{k}", f"bank {bank} top-{k}")


def columns(ks: Sequence[int], sizes: Mapping[str, int]) -> list[Column]:
    return [retrieval_from(bank, k) for bank in BANKS for k in ks]


def hits(pair: Pair, columns: Sequence[Column]) -> Iterator[Tensor]:
    for bank, queries in (BANKS, BANKS[::-1]):
        yield from hits_at(pair, bank, queries, [column for column in columns if column.bank == bank])


RETRIEVAL = Metric(
    "retrieval",
    "finds samples of the same class in the other split, in both directions",
    Table("retrieval", "Zero-shot retrieval", "Does a model find the right {unit}?"),
    frozenset({"labels"}),
    columns,
    hits,
)
