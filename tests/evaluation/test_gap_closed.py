"""The teacher gap closed over a run."""

import pytest

from d2v_composer.evaluation.evaluate import gap_closed_by_step
from d2v_composer.evaluation.metrics import metric_key

CLS = "layer_mean_cls"


def log_of(student: dict[str, dict[int, float]], teacher: dict[str, float]) -> dict[str, dict[int, float]]:
    log = {metric_key("cifar10", bank, 1, CLS): values for bank, values in student.items()}
    return log | {metric_key("cifar10", bank, 1, CLS, "teacher"): {0: value} for bank, value in teacher.items()}


def test_shares_are_the_mean_of_both_banks() -> None:
    student = {"train": {0: 0.2, 10: 0.3, 20: 0.45}, "test": {0: 0.1, 10: 0.2, 20: 0.4}}
    log = log_of(student, {"train": 0.4, "test": 0.5})
    expected = {0: 0, 10: (0.5 + 0.25) / 2, 20: (1.25 + 0.75) / 2}
    assert gap_closed_by_step(log, "cifar10", CLS) == pytest.approx(expected)
    assert gap_closed_by_step(log, "cifar10", "output_cls") == {}


def test_the_baselines_may_be_another_runs() -> None:
    student = {"train": {20: 0.45}, "test": {20: 0.4}}
    first = log_of({"train": {0: 0.2}, "test": {0: 0.1}}, {"train": 0.4, "test": 0.5})
    assert gap_closed_by_step(log_of(student, {}), "cifar10", CLS, baselines=first) == pytest.approx({20: 1.0})


def test_a_bank_without_an_advantage_does_not_count() -> None:
    log = log_of({"train": {0: 0.2, 10: 0.3}, "test": {0: 0.1, 10: 0.2}}, {"train": 0.4, "test": 0.1})
    assert gap_closed_by_step(log, "cifar10", CLS) == pytest.approx({0: 0, 10: 0.5})


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ({"train": {10: 0.3}, "test": {10: 0.2}}, {"train": 0.4, "test": 0.5}),
        ({"train": {0: 0.2, 10: 0.3}, "test": {0: 0.1, 10: 0.2}}, {}),
        ({"train": {0: 0.2, 10: 0.3}, "test": {0: 0.1, 10: 0.2}}, {"train": 0.2, "test": 0.1}),
    ],
    ids=["no untrained student", "no teacher", "no advantage"],
)
def test_without_a_baseline_there_is_no_share(student: dict[str, dict[int, float]], teacher: dict[str, float]) -> None:
    assert gap_closed_by_step(log_of(student, teacher), "cifar10", CLS) == {}
