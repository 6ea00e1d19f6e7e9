"""Exact nearest neighbors, and what is counted from them; tests/promises/test_numbers.py has real images."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from d2v_composer import knn_accuracy, neighbor_agreement
from d2v_composer.evaluation import nearest_neighbors as neighbors
from d2v_composer.evaluation.nearest_neighbors import TopK, exact_neighbors, nearest_neighbors, nearest_others
from helpers import peak_allocated


def random_vectors(*counts: int, dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(count, dim, generator=generator) for count in counts]


def cosines(queries: Tensor, bank: Tensor) -> Tensor:
    return normalize(queries.double(), dim=1) @ normalize(bank.double(), dim=1).T


@pytest.mark.parametrize(("offset", "k"), [(0.0, 1), (1.0, 20), (5.0, 20), (0.0, 200)])
def test_neighbors_are_a_brute_forces_in_float64(offset: float, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that all images share hides no neighbor: cosines near 1 differ by less than float32 tells apart."""
    monkeypatch.setattr(neighbors, "BANK_PART", 3_000)  # four parts, the last one of 100, fewer than some k
    bank, queries = (vectors + offset for vectors in random_vectors(9_100, 500, dim=96))
    expected = cosines(queries, bank).sort(dim=1, descending=True, stable=True)
    nearest = exact_neighbors(bank, queries, k)
    assert torch.equal(nearest.indices, expected.indices[:, :k])
    torch.testing.assert_close(nearest.similarities, expected.values[:, :k])
    # The length of vectors does not matter.
    scaled = exact_neighbors(bank * torch.rand(len(bank), 1).add(0.1), queries * 1000, k)
    assert (scaled.indices == nearest.indices).double().mean() > 0.999


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, queries = random_vectors(20_000, 1_000, dim=64)
    expected = nearest_neighbors(bank, queries, 5)
    monkeypatch.setattr(neighbors, "BANK_PART", 1024)
    monkeypatch.setattr(neighbors, "QUERY_PART", 256)
    results: list[TopK] = []
    assert peak_allocated(lambda: results.append(nearest_neighbors(bank, queries, 5))) < 8 << 20
    assert torch.equal(results[0].indices, expected.indices)


def test_any_k_works_and_of_equal_images_the_first_is_found_first() -> None:
    bank = torch.ones(12, 4)
    assert exact_neighbors(bank, torch.ones(2, 4), 12).indices.tolist() == [list(range(12))] * 2
    assert exact_neighbors(bank, torch.ones(0, 4), 3).indices.shape == (0, 3)
    with pytest.raises(ValueError, match="k must be from 1 to 12, the number of bank samples; got 13"):
        exact_neighbors(bank, torch.ones(2, 4), 13)
    with pytest.raises(RuntimeError, match="4x12"):  # torch names the shapes
        exact_neighbors(bank, torch.ones(2, 5), 1)


def test_the_smallest_label_wins_a_tie() -> None:
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [1.0, 0.3], [-1.0, 0.0]])
    labels = torch.tensor([7, 3, 3, 7, 1])
    query = torch.tensor([[1.0, 0.0]])
    assert knn_accuracy(bank, labels, query, torch.tensor([3]), k=4, temperature=None) == 1
    assert knn_accuracy(bank, labels, query, torch.tensor([7]), k=4, temperature=0.001) == 1  # the nearest counts most


def nearest_by_force(images: Tensor, k: int) -> Tensor:
    """Return the k other images nearest to each image, (N, K)."""
    return cosines(images, images).fill_diagonal_(-2).argsort(dim=1, descending=True, stable=True)[:, :k]


@pytest.mark.parametrize("k", [1, 10])
def test_agreement_is_a_brute_force(k: int) -> None:
    """Promise 23: the widths differ and a part is shared; all lie far from the origin, so that cosines are
    close to 1.
    """
    shared, first_part, second_part = random_vectors(400, 400, 400, dim=8)
    first, second = torch.cat([shared, first_part], dim=1) + 20, torch.cat([shared, second_part[:, :4]], dim=1) + 20
    ours, theirs = nearest_by_force(first, k), nearest_by_force(second, k)
    assert torch.equal(nearest_others(first, k), ours)
    expected = (ours[:, :, None] == theirs[:, None]).sum().item() / ours.numel()
    assert 0.05 < expected < 0.9
    assert neighbor_agreement(first, second, k) == pytest.approx(expected)
    assert neighbor_agreement(first, first * 3, k) == 1


def test_an_image_is_never_its_own_neighbor() -> None:
    """Even among more copies than neighbors, of which the first ones are found."""
    nearest = nearest_others(torch.ones(30, 4), 3)
    assert not (nearest == torch.arange(30)[:, None]).any()
    assert nearest.shape == (30, 3)
    assert all(len(set(row)) == 3 for row in nearest.tolist())
    with pytest.raises(ValueError, match="k must be from 1 to 9, the number of other samples; got 10"):
        neighbor_agreement(torch.ones(10, 4), torch.ones(10, 4))
