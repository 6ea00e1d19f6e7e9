"""Promise 23, without labels: neighbor agreement is that of a brute force in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from d2v_composer import neighbor_agreement
from d2v_composer.evaluation.nearest_neighbors import nearest_others


def random_images(num: int, channels: int, seed: int) -> Tensor:
    return torch.randn(num, channels, generator=torch.Generator().manual_seed(seed))


def cosines(queries: Tensor, bank: Tensor) -> np.ndarray:
    units = [each.double() / each.double().norm(dim=1, keepdim=True) for each in (queries, bank)]
    return (units[0] @ units[1].T).numpy()


def brute_force(images: Tensor, k: int) -> np.ndarray:
    similarities = cosines(images, images)
    np.fill_diagonal(similarities, -2)
    return np.argsort(-similarities, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("k", [1, 10])
def test_agreement_is_a_brute_force(k: int) -> None:
    """The widths differ and a part is shared; all lie far from the origin, so that cosines are close to 1."""
    shared = random_images(400, 8, seed=0)
    first = torch.cat([shared, random_images(400, 8, seed=1)], dim=1) + 20
    second = torch.cat([shared, random_images(400, 4, seed=2)], dim=1) + 20
    nearest = brute_force(first, k), brute_force(second, k)
    assert np.array_equal(nearest_others(first, k).numpy(), nearest[0])
    expected = np.mean([len(np.intersect1d(*pair)) / k for pair in zip(*nearest, strict=True)])
    assert 0.05 < expected < 0.9
    assert neighbor_agreement(first, second, k) == pytest.approx(expected)
    assert neighbor_agreement(first, first * 3, k) == 1


def test_agreement_by_chance_is_k_of_the_others() -> None:
    by_chance = neighbor_agreement(random_images(2000, 32, seed=0), random_images(2000, 32, seed=1))
    assert by_chance == pytest.approx(10 / 1999, rel=0.2)


def test_an_image_is_never_its_own_neighbor() -> None:
    """Even among more copies than neighbors, of which the first ones are found."""
    nearest = nearest_others(torch.ones(30, 4), 3)
    assert not (nearest == torch.arange(30)[:, None]).any()
    assert nearest.shape == (30, 3)
    assert all(len(set(row)) == 3 for row in nearest.tolist())
    with pytest.raises(ValueError, match="k must be from 1 to 9, the number of other images; got 10"):
        neighbor_agreement(torch.ones(10, 4), torch.ones(10, 4))
