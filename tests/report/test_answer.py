"""The verdict that says whether a student is worth it: its numbers, and its advice by the curve's slope."""

from typing import Any

import pytest
import torch

from d2v_composer.evaluation.evaluate import gap_closed_interval
from d2v_composer.evaluation.metrics import AGREEMENT, BANKS, Measure, metric_key, retrieval_from
from d2v_composer.report.answer import answer
from d2v_composer.report.run import Run

TOP1 = retrieval_from("train", 1)
SIZES = {
    "student": {"num_parameters": 2_770_000, "gflop": 0.379},
    "teacher": {"num_parameters": 3_630_000, "gflop": 0.486},
}
COSTS = "It has 2.77 M parameters (teacher: 3.63), 11.08 MB in float32 (teacher: 14.52), 0.38 GFLOP (teacher: 0.49)."
SMALLER = "smaller batches for the same number of samples"


def run_of(measure: Measure, teacher: float, *curve: float, model: str | None = None, **record: Any) -> Run:
    """A run whose student was measured every 300 batches, on 1,000 queries, of which the first are hits."""
    retrieval = {"datasets": {"set": {}}, "ks": [3, 1], "representation": "layer_mean", "pooling": "cls"}
    config = {"retrieval": retrieval, "student": {"model": model}}
    log, hits = {}, {}
    for bank in BANKS:
        each = measure._replace(key=measure.key.replace("train", bank))
        log[metric_key("set", each)] = {300 * i: value for i, value in enumerate(curve)}
        log[metric_key("set", each, baseline="teacher")] = {0: teacher}
    for name, value in {"untrained": curve[0], "": curve[-1], "teacher": teacher}.items():
        hits[metric_key("set", measure, baseline=name)] = torch.arange(1000) < round(1000 * value)
    return Run({"config": config, "data": {}, "costs": SIZES, **record}, log, {}, {}, hits)


def closed(run: Run, measure: Measure) -> str:
    hits = [run.hits[metric_key("set", measure, baseline=name)].numpy() for name in ("untrained", "", "teacher")]
    interval = gap_closed_interval(*hits)
    assert interval is not None
    value, low, high = (100 * each for each in interval)
    assert low < value < high
    return f"{value:.0f} % of the teacher gap, 95 % interval {low:.0f} to {high:.0f}"


def scores(measure: str, untrained: float, student: float, teacher: float) -> str:
    return (
        f"The student scores {student:.1f} % ({measure}, layer_mean_cls); untrained it scored {untrained:.1f} %, "
        f"and its teacher scores {teacher:.1f} %."
    )


@pytest.mark.parametrize(
    ("curve", "model", "advice"),
    [
        ((0.2, 0.3, 0.4), None, " To keep more, try longer training: the last 300 batches closed 25 %."),
        (
            (0.2, 0.396, 0.4),
            None,
            f" To keep more, try more teacher.first_blocks or {SMALLER}: the last 300 batches closed 1 %.",
        ),
        ((0.2, 0.408, 0.4), "timm/resnet18", f" To keep more, try {SMALLER}: the last 300 batches closed -2 %."),
        ((0.2, 0.5, 0.58), None, ""),
    ],
    ids=["rising", "flat", "a CNN, falling", "enough"],
)
def test_a_student_with_labels(curve: tuple[float, ...], model: str | None, advice: str) -> None:
    run = run_of(TOP1, 0.6, *curve, model=model)
    kept = closed(run, TOP1)
    assert kept.startswith(f"{100 * (curve[-1] - 0.2) / 0.4:.0f} % ")
    shown = scores("bank train top-1", 20, 100 * curve[-1], 60)
    assert [*answer(run)] == [f"On set, the student closes {kept}. {shown} {COSTS}{advice}"]


def test_a_student_without_labels() -> None:
    run = run_of(AGREEMENT, 1.0, 0.2, 0.5, 0.56)
    longer = "To keep more, try longer training: the last 300 batches closed 8 %."
    shown = scores("neighbor agreement", 20, 56, 100)
    assert [*answer(run)] == [f"On set, the student closes {closed(run, AGREEMENT)}. {shown} {COSTS} {longer}"]


def test_no_gap() -> None:
    run, shown = run_of(TOP1, 0.3, 0.3, 0.4), scores("bank train top-1", 30, 40, 30)
    assert [*answer(run)] == [f"On set, there is no teacher gap to close. {shown} {COSTS}"]


def test_nothing_is_said_of_what_was_not_measured() -> None:
    run = run_of(TOP1, 0.6, 0.2, 0.4)
    assert [*answer(run._replace(hits={key: hit for key, hit in run.hits.items() if "untrained" not in key}))] == []


def test_the_projected_embedding_has_a_pooling_of_its_own() -> None:
    run = run_of(TOP1, 0.6, 0.2, 0.4)
    run.record["config"]["retrieval"] |= {"representation": "projected", "pooling": "mean"}
    assert "(bank train top-1, projected_cls);" in next(answer(run))
