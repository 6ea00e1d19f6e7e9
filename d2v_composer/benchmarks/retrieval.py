"""Compare the exact neighbor search with the bare matrix product of queries and bank, and with faiss."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from d2v_composer.benchmarks import interleave, result_of
from d2v_composer.evaluation.nearest_neighbors import nearest_neighbors
from d2v_composer.models.precision import precision_of
from d2v_composer.models.provenance import Record
from d2v_composer.system.errors import InputError

PRODUCT, OURS, FAISS = "matrix product alone", "ours", "faiss IndexFlatIP"
# Columns of the product computed at once, so that its output stays in a buffer.
PRODUCT_PART = 2048
# Largest share of neighbors that may differ: if similarities are equal but for rounding, any order is right.
TIES = 1e-3


def benchmark(*, bank: int, queries: int, dim: int, k: int, repeats: int) -> Record:
    """Measure the queries per second of each search; the arguments are the options of ``d2v benchmark retrieval``.

    Raises:
        InputError: ``k`` is more than ``bank``.
        RuntimeError: The searches find different neighbors.
    """
    if k > bank:
        raise InputError(f"--k: must be at most {bank}, the value of --bank; got {k}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = {"bank": bank, "queries": queries, "dim": dim, "k": k, "device": device, "repeats": repeats}
    torch.manual_seed(0)
    bank_ND, queries_QD = torch.randn(bank, dim).to(device), torch.randn(queries, dim).to(device)
    searches = {
        OURS: lambda: nearest_neighbors(bank_ND, queries_QD, k).indices.cpu(),
        FAISS: lambda: search_with_faiss(bank_ND.cpu(), queries_QD.cpu(), k),
    }
    check_neighbors(searches[FAISS](), searches[OURS]())
    passes = {PRODUCT: lambda: multiply(bank_ND, queries_QD), **searches}
    rates = interleave({name: (search, queries) for name, search in passes.items()}, repeats)
    return result_of(setting, "queries/s", rates, [(OURS, PRODUCT)])


def multiply(bank_ND: Tensor, queries_QD: Tensor) -> None:
    """Multiply every query by every bank vector, and discard the products."""
    buffer = bank_ND.new_empty(len(queries_QD), PRODUCT_PART)
    with precision_of(None, bank_ND.device.type):
        for part in bank_ND.split(PRODUCT_PART):
            torch.mm(queries_QD, part.T, out=buffer[:, : len(part)])


def search_with_faiss(bank_ND: Tensor, queries_QD: Tensor, k: int) -> Tensor:
    """Return the indices of each query's k nearest vectors of the bank, (Q, k), found by faiss."""
    import faiss

    index = faiss.IndexFlatIP(bank_ND.shape[1])
    index.add(normalize(bank_ND, dim=1).numpy())
    return torch.from_numpy(index.search(normalize(queries_QD, dim=1).numpy(), k)[1])


def check_neighbors(theirs: Tensor, ours: Tensor) -> None:
    """Check that two searches find nearly the same neighbors, (Q, k).

    Raises:
        RuntimeError: More than the share ``TIES`` of the neighbors differs.
    """
    if (theirs != ours).double().mean() > TIES:
        raise RuntimeError(f"{FAISS!r} and {OURS!r} find different neighbors")
