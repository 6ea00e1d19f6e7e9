"""The map into a teacher's space: scikit-learn's ridge regression, with the strength that held-out pairs choose."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from torch import Tensor
from torch.nn.functional import linear

from d2v_composer.models.alignment import HELD_OUT, STRENGTHS, Fit, Moments


def related(num_pairs: int = 600, num_copies: int = 0) -> tuple[Tensor, Tensor]:
    """Return inputs, (N, 20), of which some are copies of others, and targets, (N, 8), which follow from them."""
    generator = torch.Generator().manual_seed(0)
    inputs = 3 + torch.randn(num_pairs, 20 - num_copies, generator=generator) * torch.logspace(-1, 1, 20 - num_copies)
    exact = inputs @ torch.randn(20 - num_copies, 8, generator=generator)
    targets = 1 + exact + torch.randn(exact.shape, generator=generator)
    return torch.cat([inputs, inputs[:, :num_copies]], dim=1), targets


def fitted(inputs: Tensor, targets: Tensor, whole: bool = True) -> Fit:
    moments = Moments()
    for pairs in zip(inputs.split(64), targets.split(64), strict=True):
        moments.add(*pairs)
    return moments.fit(whole)


@pytest.mark.parametrize("num_copies", [0, 6])
def test_it_is_scikit_learns_ridge(num_copies: int) -> None:
    inputs, targets = related(num_copies=num_copies)
    fit = fitted(inputs, targets)
    expected = Ridge(alpha=fit.statistics["ridge"], solver="cholesky").fit(inputs.double(), targets.double())
    np.testing.assert_allclose(fit.weight, expected.coef_, atol=1e-6)
    np.testing.assert_allclose(fit.bias, expected.intercept_, atol=1e-5)
    assert fit.statistics["pairs"] == 600


def choose_with_scikit_learn(inputs: Tensor, targets: Tensor) -> tuple[Ridge, float]:
    """Return the fit with the least error on every tenth pair among fits to the others, one a strength; and its R²."""
    x, y, is_seen = inputs.double().numpy(), targets.double().numpy(), np.arange(len(inputs)) % HELD_OUT < HELD_OUT - 1
    unit = x[is_seen].var(axis=0).mean() * is_seen.sum()  # Ridge's error is a sum over pairs
    ridges = [Ridge(alpha=strength * unit).fit(x[is_seen], y[is_seen]) for strength in STRENGTHS]
    errors = [np.square(ridge.predict(x[~is_seen]) - y[~is_seen]).sum() for ridge in ridges]
    assert min(errors) < errors[0]
    return ridges[int(np.argmin(errors))], 1 - min(errors) / np.square(y[~is_seen] - y[is_seen].mean(axis=0)).sum()


def test_held_out_pairs_choose_the_strength() -> None:
    expected, _ = choose_with_scikit_learn(*related(60))
    np.testing.assert_allclose(fitted(*related(60), whole=False).weight, expected.coef_, atol=1e-6)


def test_r2_is_that_of_held_out_pairs_even_if_the_map_is_fitted_to_all() -> None:
    _, expected = choose_with_scikit_learn(*related(60))
    assert fitted(*related(60), whole=False).statistics["r2"] == pytest.approx(expected)
    assert fitted(*related(60), whole=True).statistics["r2"] == pytest.approx(expected)


def test_what_no_map_follows_from_has_no_r2() -> None:
    inputs, targets = related()
    assert fitted(inputs, targets).statistics["r2"] > 0.9
    assert fitted(inputs, targets.flip(0)).statistics["r2"] < 0.05


@pytest.mark.parametrize(
    ("count", "number", "found"), [(19, 0.0, "19 pairs"), (100, torch.inf, "100 pairs, not all finite")]
)
def test_pairs_that_give_no_map_are_refused(count: int, number: float, found: str) -> None:
    inputs, targets = related(count)
    targets[3, 2] = number
    with pytest.raises(ValueError, match=f"^expected at least 20 pairs of finite embeddings, got {found}$"):
        fitted(inputs, targets)


def test_a_map_of_float32_is_as_good(one_thread: None) -> None:
    inputs, targets = related()
    fit = fitted(inputs, targets)
    assert fit.weight.dtype == torch.float32
    assert r2_score(targets, linear(inputs, fit.weight, fit.bias)) > 0.9
