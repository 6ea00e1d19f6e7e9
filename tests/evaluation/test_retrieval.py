"""Exact nearest neighbors, and accuracies counted from them; tests/promises/test_numbers.py has real images."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from d2v_composer import knn_accuracy
from d2v_composer.evaluation import nearest_neighbors as neighbors
from d2v_composer.evaluation.nearest_neighbors import TopK, exact_neighbors, nearest_neighbors
from helpers import peak_allocated


def random_vectors(*counts: int, dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(count, dim, generator=generator) for count in counts]


@pytest.mark.parametrize(("offset", "k"), [(0.0, 1), (1.0, 20), (5.0, 20), (0.0, 200)])
def test_neighbors_are_a_brute_forces_in_float64(offset: float, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that all images share hides no neighbor: cosines near 1 differ by less than float32 tells apart."""
    monkeypatch.setattr(neighbors, "BANK_PART", 3_000)  # four parts, the last one of 100, fewer than some k
    bank, queries = (each + offset for each in random_vectors(9_100, 500, dim=96))
    units = [normalize(each.double(), dim=1) for each in (queries, bank)]
    expected = (units[0] @ units[1].T).sort(dim=1, descending=True, stable=True)
    found = exact_neighbors(bank, queries, k)
    assert torch.equal(found.indices, expected.indices[:, :k])
    torch.testing.assert_close(found.similarities, expected.values[:, :k])
    # The length of vectors does not matter.
    scaled = exact_neighbors(bank * torch.rand(len(bank), 1).add(0.1), queries * 1000, k)
    assert (scaled.indices == found.indices).double().mean() > 0.999


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, queries = random_vectors(40_000, 2_000, dim=64)
    expected = nearest_neighbors(bank, queries, 5)
    monkeypatch.setattr(neighbors, "BANK_PART", 1024)
    monkeypatch.setattr(neighbors, "QUERY_PART", 256)
    found: list[TopK] = []
    assert peak_allocated(lambda: found.append(nearest_neighbors(bank, queries, 5))) < 8 << 20
    assert torch.equal(found[0].indices, expected.indices)


def test_any_k_works_and_of_equal_images_the_first_is_found_first() -> None:
    bank = torch.ones(12, 4)
    assert exact_neighbors(bank, torch.ones(2, 4), 12).indices.tolist() == [list(range(12))] * 2
    assert exact_neighbors(bank, torch.ones(0, 4), 3).indices.shape == (0, 3)
    with pytest.raises(ValueError, match="k must be from 1 to 12, the number of bank images; got 13"):
        exact_neighbors(bank, torch.ones(2, 4), 13)
    with pytest.raises(RuntimeError, match="4x12"):  # torch names the shapes
        exact_neighbors(bank, torch.ones(2, 5), 1)


def test_the_smallest_label_wins_a_tie() -> None:
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [1.0, 0.3], [-1.0, 0.0]])
    labels = torch.tensor([7, 3, 3, 7, 1])
    query = torch.tensor([[1.0, 0.0]])
    assert knn_accuracy(bank, labels, query, torch.tensor([3]), k=4, temperature=None) == 1
    assert knn_accuracy(bank, labels, query, torch.tensor([7]), k=4, temperature=0.001) == 1  # the nearest counts most
