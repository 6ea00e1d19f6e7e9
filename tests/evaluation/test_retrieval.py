"""Exact nearest neighbors, and accuracies counted from them."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from d2v_composer.data.labeled import LabeledSet, load_labeled_set
from d2v_composer.evaluation import nearest_neighbors as neighbors
from d2v_composer.evaluation.nearest_neighbors import TopK, nearest_neighbors, retrieval_accuracy, top_k
from helpers import QUICKSTART, peak_allocated


@pytest.fixture(scope="module")
def cifar() -> LabeledSet:
    """The shipped images: 4,480 for the bank, 2,000 queries."""
    return load_labeled_set("mds", QUICKSTART / "cifar10", image_size=32, interpolation="bicubic")


def pixels(images: Tensor) -> Tensor:
    return images.flatten(1).float() - 127


def sklearn_neighbors(bank: Tensor, queries: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances and indices by brute force."""
    brute = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine").fit(bank.double().numpy())
    return brute.kneighbors(queries.double().numpy())


def assert_same_neighbors(bank: Tensor, queries: Tensor, k: int) -> None:
    """Index for index, except where scikit-learn's own distances tie to float32's last digits."""
    distances, expected = sklearn_neighbors(bank, queries, k + 1)
    ours = nearest_neighbors(bank, queries, k).indices.numpy()
    gaps = np.diff(distances, axis=1)
    clear = np.minimum(gaps, np.pad(gaps, ((0, 0), (1, 0)), constant_values=1)[:, :k]) > 1e-6
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(ours[clear], expected[:, :k][clear])


def test_neighbors_of_real_images_are_scikit_learns(cifar: LabeledSet) -> None:
    assert_same_neighbors(pixels(cifar.train.images), pixels(cifar.test.images[:500]), k=3)


def test_neighbors_in_a_bank_of_several_parts_are_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    bank, queries = (torch.randn(count, 192, generator=generator) for count in (10_000, 500))
    monkeypatch.setattr("d2v_composer.evaluation.nearest_neighbors.BANK_PART", 3_000)  # four parts, the last one short
    assert_same_neighbors(bank, queries, k=20)


@pytest.mark.parametrize("k", [1, 40, 129, 130, 4000])
@pytest.mark.parametrize("num_columns", [1, 64, 127, 8191, 8192])
def test_top_k_in_two_levels_is_topk(num_columns: int, k: int) -> None:
    similarities = torch.randn(5, num_columns, generator=torch.Generator().manual_seed(k))
    values, indices = top_k(similarities, k)
    expected = similarities.topk(min(k, num_columns), dim=1)
    assert torch.equal(values, expected.values)
    assert torch.equal(indices, expected.indices)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    bank, queries = (torch.randn(count, 64, generator=generator) for count in (40_000, 2_000))
    expected = nearest_neighbors(bank, queries, 5)
    monkeypatch.setattr(neighbors, "BANK_PART", 1024)
    monkeypatch.setattr(neighbors, "QUERY_PART", 256)
    found: list[TopK] = []
    assert peak_allocated(lambda: found.append(nearest_neighbors(bank, queries, 5))) < 8 << 20
    assert torch.equal(found[0].indices, expected.indices)


def test_any_k_works() -> None:
    bank, queries = torch.randn(300, 16), torch.randn(7, 16)
    everything = nearest_neighbors(bank, queries, 300).indices
    assert torch.equal(everything.sort(dim=1).values, torch.arange(300).expand(7, -1))
    assert torch.equal(everything[:, :9], nearest_neighbors(bank, queries, 9).indices)
    assert nearest_neighbors(bank, queries[:0], 3).indices.shape == (0, 3)


def test_accuracy_by_hand() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 5.0], [-1.0, 0.0]])
    bank_labels = torch.tensor([0, 1, 2, 3])
    queries = torch.tensor([[2.0, 0.01], [0.1, 1.0], [0.2, -0.01]])
    # Nearest first: (0, 1, 2), (2, 1, 0) and (0, 1, ...): right at once, only among three, and never.
    assert retrieval_accuracy(bank, bank_labels, queries, torch.tensor([0, 0, 3])) == {1: 1 / 3, 3: 2 / 3}


def test_the_length_of_vectors_does_not_matter() -> None:
    bank, queries = torch.randn(50, 8), torch.randn(20, 8)
    scaled = nearest_neighbors(bank * torch.rand(50, 1).add(0.1), queries * 1000, 5)
    found = nearest_neighbors(bank, queries, 5)
    assert torch.equal(scaled.indices, found.indices)
    cosines = torch.nn.functional.cosine_similarity(queries[:, None], bank[found.indices], dim=2)
    torch.testing.assert_close(found.similarities, cosines)
    torch.testing.assert_close(scaled.similarities, cosines)


@pytest.mark.parametrize(
    ("bank", "queries", "ks", "message"),
    [
        ((4, 3), (2, 5), (1,), "must agree in D"),
        ((4, 3), (2, 3), (5,), "k must be from 1 to the bank's 4 images, got 5"),
        ((4, 3), (0, 3), (1,), "there is no query"),
    ],
)
def test_refuses_shapes_that_do_not_agree(
    bank: tuple[int, int], queries: tuple[int, int], ks: tuple[int], message: str
) -> None:
    labels = torch.zeros(bank[0], dtype=torch.int64), torch.zeros(queries[0], dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        retrieval_accuracy(torch.randn(bank), labels[0], torch.randn(queries), labels[1], ks)
