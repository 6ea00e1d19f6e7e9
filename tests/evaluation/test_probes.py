"""Probes of frozen embeddings: the vote of neighbors equals a brute force, the linear probe is scikit-learn's."""

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import normalize

from d2v_composer import knn_accuracy, linear_probe_accuracy, load_teacher
from d2v_composer.data.labeled import load_labeled_set
from d2v_composer.evaluation import linear_probe
from d2v_composer.evaluation.linear_probe import STRENGTHS, fit_linear_probe
from d2v_composer.evaluation.nearest_neighbors import exact_neighbors
from helpers import QUICKSTART


class Embedded(NamedTuple):
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


@pytest.fixture(scope="module")
def real() -> Embedded:
    """The quickstart's teacher's embeddings of shipped CIFAR images, rounded as those of a run in bfloat16."""
    labeled = load_labeled_set("mds", QUICKSTART / "cifar10", image_size=32, interpolation="bicubic").at_most(600)
    teacher = load_teacher(QUICKSTART / "teacher.safetensors")
    train, test = (
        torch.cat([teacher.embed(part, representation="layer_mean") for part in split.images.split(64)])
        for split in labeled[:2]
    )
    train, test = train.bfloat16().float(), test.bfloat16().float()
    return Embedded(train, labeled.train.labels, test, labeled.test.labels)


def brute_force(data: Embedded, k: int, temperature: float | None) -> Iterator[int]:
    """Yield each test image's label by a vote, computed one image after the other in float64."""
    unit = [(each / each.norm(dim=1, keepdim=True)).numpy() for each in (data.train.double(), data.test.double())]
    for similarities in unit[1] @ unit[0].T:
        votes = np.zeros(int(data.train_labels.max()) + 1)
        for neighbor in np.argsort(-similarities, kind="stable")[:k]:
            weight = 1 if temperature is None else np.exp(similarities[neighbor] / temperature)
            votes[data.train_labels[neighbor]] += weight
        yield int(votes.argmax())


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (20, None), (5, 0.5), (1, None)])
def test_votes_are_those_of_a_brute_force(real: Embedded, k: int, temperature: float | None) -> None:
    expected = np.mean(np.fromiter(brute_force(real, k, temperature), int) == real.test_labels.numpy())
    assert knn_accuracy(*real, k=k, temperature=temperature) == expected
    assert 0.3 < expected < 0.7


@pytest.mark.parametrize("offset", [0.0, 1.0, 5.0])
def test_what_all_images_have_in_common_hides_no_neighbor(real: Embedded, offset: float) -> None:
    """Cosines near 1 differ by less than float32 tells apart."""
    data = real._replace(train=real.train + offset, test=real.test + offset)
    found = exact_neighbors(data.train, data.test, 20).indices
    units = [normalize(each.double(), dim=1) for each in (data.test, data.train)]
    expected = (units[0] @ units[1].T).sort(dim=1, descending=True, stable=True).indices[:, :20]
    assert torch.equal(found, expected)


def test_the_first_of_equal_images_is_found_first() -> None:
    bank = torch.ones(12, 4)
    assert exact_neighbors(bank, torch.ones(2, 4), 12).indices.tolist() == [list(range(12))] * 2
    assert exact_neighbors(bank, torch.ones(0, 4), 3).indices.shape == (0, 3)


def test_the_smallest_label_wins_a_tie() -> None:
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [1.0, 0.3], [-1.0, 0.0]])
    labels = torch.tensor([7, 3, 3, 7, 1])
    query = torch.tensor([[1.0, 0.0]])
    assert knn_accuracy(bank, labels, query, torch.tensor([3]), k=4, temperature=None) == 1
    assert knn_accuracy(bank, labels, query, torch.tensor([7]), k=4, temperature=0.001) == 1  # the nearest counts most


def sklearn_accuracy(data: Embedded, strength: float) -> float:
    C = 1 / (strength * len(data.train))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, tol=1e-6, max_iter=2000))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        model.fit(data.train.double().numpy(), data.train_labels.numpy())
    return float(model.score(data.test.double().numpy(), data.test_labels.numpy()))


@pytest.mark.parametrize("strength", [1.0, 1e-2, 1e-4])
def test_a_linear_probe_of_real_embeddings_is_scikit_learns(real: Embedded, strength: float) -> None:
    assert abs(linear_probe_accuracy(*real, strength=strength) - sklearn_accuracy(real, strength)) <= 0.003


def test_the_chosen_strength_is_good_and_the_choice_repeats(real: Embedded) -> None:
    probe, again = (fit_linear_probe(real.train, real.train_labels) for _ in range(2))
    assert probe.strength in STRENGTHS[1:-1]
    assert torch.equal(probe.weight, again.weight)
    best = max(linear_probe_accuracy(*real, strength=strength) for strength in STRENGTHS[:6:2])
    assert linear_probe_accuracy(*real) > best - 0.05


def blobs(num_train: int, dim: int, num_classes: int = 4) -> Embedded:
    """Overlapping clouds of points, one a class."""
    generator = torch.Generator().manual_seed(1)
    centres = 1.5 * torch.randn(num_classes, dim, generator=generator) / dim**0.5 * 3
    parts = []
    for count in (num_train, 1000):
        labels = torch.arange(count) % num_classes
        parts += [centres[labels] + torch.randn(count, dim, generator=generator), labels]
    return Embedded(*parts)


def hard_case(name: str) -> Embedded:
    data = blobs(60, 200) if name == "more channels than images" else blobs(400, 10)
    if name == "collinear channels":
        mix = torch.randn(10, 30, generator=torch.Generator().manual_seed(2))
        return data._replace(train=data.train @ mix, test=data.test @ mix)
    if name == "constant channels":
        train, test = (torch.cat([x, x.new_tensor([0.0, 0.1, 1e6]).expand(len(x), 3)], 1) for x in (data[0], data[2]))
        return data._replace(train=train, test=test)
    if name == "a class of one image":  # it may be held out, or not
        labels = data.train_labels.clone()
        labels[0] = 9
        return data._replace(train_labels=labels)
    if name == "channels of all scales":
        scale = 10.0 ** torch.arange(-8, 2)
        return data._replace(train=data.train * scale, test=data.test * scale)
    return data


HARD_CASES = [
    "more channels than images",
    "collinear channels",
    "constant channels",
    "a class of one image",
    "channels of all scales",
]


@pytest.mark.parametrize("case", HARD_CASES)
def test_hard_cases_are_scikit_learns(case: str) -> None:
    data = hard_case(case)
    probe = fit_linear_probe(data.train, data.train_labels)
    ours = (probe.predict(data.test) == data.test_labels).double().mean().item()
    assert ours > 0.5
    assert abs(ours - sklearn_accuracy(data, probe.strength)) <= 0.003


def test_warns_of_a_fit_that_has_not_converged_and_of_no_other(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 the loss of the last line search hardly changes, far from the least gradient."""
    labels = train = torch.empty(0)
    for seed in range(6):
        torch.manual_seed(seed)
        labels = torch.randint(7, (600,))
        train = (torch.randn(7, 24) * 0.9)[labels] + torch.randn(600, 24)
        for strength in (10.0, 1.0, 0.1):
            fit_linear_probe(train, labels, strength)
    assert caplog.messages == []
    monkeypatch.setattr(linear_probe, "MAX_ITERATIONS", 2)
    fit_linear_probe(train, labels, 1e-3)
    assert caplog.messages == ["linear probe: not converged in 2 iterations at strength 0.001"]


def test_degenerate_embeddings_are_classified_all_the_same() -> None:
    """Overflowed values, one class, one image, all alike: no error ends the training that measures them."""
    data = blobs(40, 6)
    broken = data.train.clone()
    broken[3, 2], broken[5, 1] = float("nan"), float("inf")
    assert linear_probe_accuracy(broken, *data[1:]) > 0.3
    assert linear_probe_accuracy(torch.ones(40, 6), *data[1:]) == 0.25
    assert linear_probe_accuracy(data.train, torch.zeros(40).long(), *data[2:]) == 0.25
    assert linear_probe_accuracy(data.train[:1], data.train_labels[:1], *data[2:]) == 0.25
