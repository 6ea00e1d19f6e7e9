"""Measure the exact neighbor search beside the bare matrix product of queries and bank, and beside faiss."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from d2v_composer.benchmarks.measure import Result, interleave, ratio
from d2v_composer.evaluation.nearest_neighbors import full_float32, nearest_neighbors

PRODUCT, OURS, FAISS = "matrix product alone", "ours", "faiss IndexFlatIP"
# Columns of the product computed at once, so that its output stays in a buffer.
PRODUCT_PART = 2048
# Neighbors whose similarities differ by no more may come in any order.
TIE = 1e-6


def benchmark_retrieval(num_bank: int, num_queries: int, dim: int, k: int, device: str, rounds: int) -> Result:
    """Measure queries per second of each search, on the same random vectors.

    Args:
        num_bank: Vectors to search.
        num_queries: Vectors to look up.
        dim: Channels of a vector.
        k: Neighbors of a query.
        device: cpu or cuda; faiss uses the CPU.
        rounds: Measured passes of each search.

    Raises:
        RuntimeError: faiss finds other neighbors.
    """
    torch.manual_seed(0)
    bank, queries = torch.randn(num_bank, dim).to(device), torch.randn(num_queries, dim).to(device)
    searches: dict[str, Callable[[], NDArray[np.int64]]] = {
        OURS: lambda: nearest_neighbors(bank, queries, k).indices.cpu().numpy(),
        FAISS: lambda: search_with_faiss(bank.cpu().numpy(), queries.cpu().numpy(), k),
    }
    check_neighbors(bank, queries, {name: search() for name, search in searches.items()})
    passes = {PRODUCT: matrix_product(bank, queries), **searches}
    rates = {name: each * num_queries for name, each in interleave(passes, rounds).items()}
    return Result(
        title=f"{k} nearest of {num_bank} × {dim} for {num_queries} queries, {device}, {rounds} interleaved rounds",
        unit="queries/s",
        setting={"bank": num_bank, "queries": num_queries, "dim": dim, "k": k, "device": device, "rounds": rounds},
        rates=rates,
        ratios=[("ours ÷ matrix product", ratio(rates[OURS], rates[PRODUCT]), 0.625)],
        packages=("torch", "faiss-cpu", "numpy"),
    )


def matrix_product(bank: Tensor, queries: Tensor) -> Callable[[], None]:
    """Return the least work of any search: multiply every query with every bank vector, and keep nothing."""
    parts = normalize(bank, dim=1).split(PRODUCT_PART)
    buffer = bank.new_empty(len(queries), len(parts[0]))

    def multiply() -> None:
        with full_float32(bank.device.type):
            for part in parts:
                torch.mm(queries, part.T, out=buffer if len(part) == buffer.shape[1] else buffer.new_empty(0))
        if bank.is_cuda:
            torch.cuda.synchronize()

    return multiply


def search_with_faiss(bank: NDArray[np.float32], queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the neighbors, (Q, k), as faiss finds them by brute force."""
    import faiss

    bank, queries = bank.copy(), queries.copy()
    faiss.normalize_L2(bank)
    faiss.normalize_L2(queries)
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank)
    return index.search(queries, k)[1]


def check_neighbors(bank: Tensor, queries: Tensor, found: Mapping[str, NDArray[np.int64]]) -> None:
    """Compare the neighbors of all searches with ours, except for ties.

    Raises:
        RuntimeError: A search finds other neighbors.
    """
    unit_bank, unit_queries = (normalize(each.double().cpu(), dim=1) for each in (bank, queries))
    for name, neighbors in found.items():
        rows, columns = np.nonzero(neighbors != found[OURS])
        theirs, ours = (unit_bank[each[rows, columns]] for each in (neighbors, found[OURS]))
        if (((theirs - ours) * unit_queries[rows]).sum(dim=1).abs() > TIE).any():
            raise RuntimeError(f"{name!r} finds other neighbors than {OURS!r}")
