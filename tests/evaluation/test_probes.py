"""The linear probe is scikit-learn's in hard cases too; tests/promises/test_numbers.py has real images."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from d2v_composer import knn_accuracy, linear_probe_accuracy
from d2v_composer.evaluation import linear_probe
from d2v_composer.evaluation.embedded_set import check_finite, embed_set
from d2v_composer.evaluation.linear_probe import STRENGTHS, fit_linear_probe
from d2v_composer.evaluation.measurement import measure
from d2v_composer.evaluation.rows import rows_of
from d2v_composer.evaluation.settings import Settings
from d2v_composer.sources.labeled import EvaluationSet, LabeledSamples
from d2v_composer.system.errors import RunError


class Embedded(NamedTuple):
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def sklearn_accuracy(data: Embedded, strength: float) -> float:
    C = 1 / (strength * len(data.train))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, tol=1e-6, max_iter=2000))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        model.fit(data.train.double().numpy(), data.train_labels.numpy())
    return float(model.score(data.test.double().numpy(), data.test_labels.numpy()))


def blobs(num_train: int, dim: int, num_classes: int = 4) -> Embedded:
    """Overlapping clouds of points, one a class."""
    generator = torch.Generator().manual_seed(1)
    centres = 1.5 * torch.randn(num_classes, dim, generator=generator) / dim**0.5 * 3
    parts = []
    for count in (num_train, 1000):
        labels = torch.arange(count) % num_classes
        parts += [centres[labels] + torch.randn(count, dim, generator=generator), labels]
    return Embedded(*parts)


def hard_cases() -> dict[str, Embedded]:
    data = blobs(400, 10)
    mix, scale = torch.randn(10, 30, generator=torch.Generator().manual_seed(2)), 10.0 ** torch.arange(-8, 2)
    labels = data.train_labels.clone()
    labels[0] = 9  # it may be held out, or not

    def changed(change: Callable[[Tensor], Tensor]) -> Embedded:
        return data._replace(train=change(data.train), test=change(data.test))

    return {
        "more channels than images": blobs(60, 200),
        "collinear channels": changed(lambda x: x @ mix),
        "constant channels": changed(lambda x: torch.cat([x, torch.tensor([0.0, 0.1, 1e6]).expand(len(x), 3)], 1)),
        "a class of one image": data._replace(train_labels=labels),
        "channels of all scales": changed(lambda x: x * scale),
        "none": data,
    }


@pytest.mark.parametrize("case", hard_cases())
def test_hard_cases_are_scikit_learns(case: str) -> None:
    data = hard_cases()[case]
    probe, again = (fit_linear_probe(data.train, data.train_labels) for _ in range(2))
    assert torch.equal(probe.weight, again.weight)
    ours = (probe.predict(data.test) == data.test_labels).double().mean().item()
    assert ours > 0.5
    assert abs(ours - sklearn_accuracy(data, probe.strength)) <= 0.003
    assert ours > max(linear_probe_accuracy(*data, strength=strength) for strength in STRENGTHS[:6:2]) - 0.05


def test_degenerate_embeddings_are_classified_all_the_same() -> None:
    """Overflowed values, one class, one image, all alike: no error ends the training that measures them."""
    data = blobs(40, 6)
    broken = data.train.clone()
    broken[3, 2], broken[5, 1] = float("nan"), float("inf")
    assert linear_probe_accuracy(broken, *data[1:]) > 0.3
    assert linear_probe_accuracy(torch.ones(40, 6), *data[1:]) == 0.25
    assert linear_probe_accuracy(data.train, torch.zeros(40).long(), *data[2:]) == 0.25
    assert linear_probe_accuracy(data.train[:1], data.train_labels[:1], *data[2:]) == 0.25


def test_embeddings_that_are_not_finite_are_named() -> None:
    """Overflowed in half precision, or by large weights, they would have an accuracy like any others."""
    data = blobs(40, 6)
    labeled = EvaluationSet(LabeledSamples(data.train, data.train_labels), LabeledSamples(data.test, data.test_labels))
    settings = Settings("a", (1,), (), augment=None, batch_size=1000)
    refused = pytest.raises(RunError, match=r"^set, train: some embeddings of 'student' are infinite or NaN$")
    for value, expected in ((0.0, nullcontext()), (torch.nan, refused), (torch.inf, refused)):
        embeds = {"student": lambda x, value=value: {"a": x.index_fill(0, torch.tensor(3), value)}}
        with expected:
            check_finite("set", embed_set(embeds, "set", labeled, settings))


def test_doubts_a_fit_that_has_not_converged_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 the loss of the last line search hardly changes, far from the least gradient."""
    data = blobs(600, 24, num_classes=7)
    for strength in (10.0, 0.1, 1e-3, 1e-7):
        assert fit_linear_probe(data.train, data.train_labels, strength).converged
    monkeypatch.setattr(linear_probe, "MAX_EVALUATIONS", 2)
    assert not fit_linear_probe(data.train, data.train_labels, 1e-3).converged


def test_fewer_than_20_train_images_say_how_many_voted() -> None:
    data = blobs(9, 6)
    labeled = EvaluationSet(LabeledSamples(data.train, data.train_labels), LabeledSamples(data.test, data.test_labels))
    settings = Settings("a", (1,), ["knn"], augment=None, batch_size=1000)
    embeds = {"student": lambda x: {"a": x}}
    results = measure(rows_of(embeds), embed_set(embeds, "", labeled, settings), "", labeled, settings)
    voted = {result.column.heading: result for result in results if result.column.metric == "knn"}
    assert voted.keys() == {"9-NN weighted", "9-NN majority"}
    assert {result.column.k for result in voted.values()} == {9}
    assert voted["9-NN weighted"].hits.double().mean() == knn_accuracy(*data, k=9)


def test_a_warning_names_model_and_data_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run measures its student many times; an embedding that no table shows is not named."""
    monkeypatch.setattr(linear_probe, "MAX_EVALUATIONS", 2)
    data = blobs(40, 6)
    labeled = EvaluationSet(LabeledSamples(data.train, data.train_labels), LabeledSamples(data.test, data.test_labels))
    embeds = dict.fromkeys(["student", "teacher"], lambda x: {"a": x, "b": x})
    settings = Settings("a", (1,), ["linear"], augment=None, batch_size=1000, needs_all=True)
    embedded = embed_set(embeds, "", labeled, settings)
    for dataset in ("first", "first", "second"):
        results = list(measure(rows_of(embeds), embedded, dataset, labeled, settings))
        assert len(results) == 2 * 2 * 3
    assert caplog.messages == [
        f"{dataset}, {model}: the linear probe has not converged; its accuracy may be too low"
        for dataset in ("first", "second")
        for model in ("student", "teacher")
    ]
