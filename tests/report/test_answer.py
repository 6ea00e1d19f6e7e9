"""The verdict on a student, with its advice by the curve's slope; a study's table; the plot of quality over speed."""

import math
import re
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from d2v_composer.evaluation.evaluate import Evaluation
from d2v_composer.evaluation.labeled_retrieval import Lookup
from d2v_composer.evaluation.rows import (
    AGREEMENT,
    BANKS,
    GAP,
    LINEAR,
    UNTRAINED,
    Measure,
    Result,
    gap_closed_interval,
    metric_key,
    retrieval_from,
)
from d2v_composer.models.names import RAW_EMBEDDINGS
from d2v_composer.report.plots import quality_over_speed
from d2v_composer.report.run import Run, verdicts
from d2v_composer.report.tables import accuracy_tables, study_table

TOP1 = retrieval_from("train", 1)
SIZES = {
    "student": {"num_parameters": 2_770_000, "gflop": 0.379},
    "teacher": {"num_parameters": 3_630_000, "gflop": 0.486},
}
COSTS = "It has 2.77 M parameters (teacher: 3.63), 11.08 MB in float32 (teacher: 14.52), 0.38 GFLOP (teacher: 0.49)."
SMALLER = "smaller batches for the same number of samples: the last 300 batches closed"


def run_of(measure: Measure, teacher: float, *curve: float, model: str | None = None, **record: Any) -> Run:
    """A run whose student was measured every 300 batches, on 1,000 queries, of which the first are hits."""
    retrieval = {"datasets": {"set": {}}, "ks": [3, 1], "representation": "layer_mean", "pooling": "cls"}
    config = {"retrieval": retrieval, "student": {"model": model}}
    log = {}
    for bank in BANKS:
        bank_measure = measure._replace(key=measure.key.replace("train", bank))
        log[metric_key("set", bank_measure)] = {300 * i: value for i, value in enumerate(curve)}
        log[metric_key("set", bank_measure, row="teacher")] = {0: teacher}
    last = 300 * (len(curve) - 1)
    results = [
        Result(row, "set", measure, "", True, torch.arange(1000) < round(1000 * value), last)
        for row, value in zip(GAP, (curve[0], curve[-1], teacher), strict=True)
    ]
    return Run({"config": config, "data": {}, "costs": SIZES, **record}, log, {}, results)


def closed(run: Run) -> str:
    interval = gap_closed_interval(*(result.hits.numpy() for result in run.results))
    assert interval is not None
    value, low, high = (100 * share for share in interval[:3])
    assert low < value < high
    return f"{value:.0f} % of the teacher gap, 95 % interval {low:.0f} to {high:.0f}"


def scores(measure: str, untrained: float, student: float, teacher: float, batch: int = 600) -> str:
    return (
        f"The student scores {student:.1f} % ({measure}, layer_mean_cls, batch {batch}); untrained it scored "
        f"{untrained:.1f} %, and its teacher scores {teacher:.1f} %."
    )


@pytest.mark.parametrize(
    ("curve", "model", "advice"),
    [
        ((0.2, 0.3, 0.4), None, " To close more, try longer training: the last 300 batches closed 25 %."),
        ((0.2, 0.396, 0.4), None, f" To close more, try more teacher.first_blocks or {SMALLER} 1 %."),
        ((0.2, 0.408, 0.4), "timm/resnet18", f" To close more, try {SMALLER} -2 %."),
        ((0.2, 0.5, 0.58), None, ""),
    ],
    ids=["rising", "flat", "a CNN, falling", "enough"],
)
def test_a_student_with_labels(curve: tuple[float, ...], model: str | None, advice: str) -> None:
    run = run_of(TOP1, 0.6, *curve, model=model)
    kept = closed(run)
    assert kept.startswith(f"{100 * (curve[-1] - 0.2) / 0.4:.0f} % ")
    shown = scores("bank train top-1", 20, 100 * curve[-1], 60)
    expected = [f"On set, the student closes {kept}. {shown} {COSTS}{advice}"]
    assert [*verdicts(run)] == expected
    # An interrupted run logged more, after its checkpoint.
    assert [*verdicts(run._replace(log={key: {**values, 900: 0.9} for key, values in run.log.items()}))] == expected


def test_a_student_without_labels() -> None:
    run = run_of(AGREEMENT, 1.0, 0.2, 0.5, 0.56)
    longer = "To close more, try longer training: the last 300 batches closed 8 %."
    shown = scores("neighbor agreement", 20, 56, 100)
    assert [*verdicts(run)] == [f"On set, the student closes {closed(run)}. {shown} {COSTS} {longer}"]


def test_a_student_in_its_teachers_index() -> None:
    """The student hits 400 of 1,000 queries by itself and 500 in the index, all these again; the teacher 580."""
    run = run_of(TOP1, 0.6, 0.2, 0.4)
    hits = {"student in the teacher's index": torch.arange(1000) < 500, "teacher, projected": torch.arange(1000) < 580}
    aligned = [run.results[1]._replace(row=row, hits=right) for row, right in hits.items()]
    _, said = verdicts(run._replace(results=[*run.results, *aligned]))
    bounds = re.fullmatch(
        r"In its teacher's index, the student scores 50\.0 %: \+10\.0 points compared with its own index "
        r"\[\+(\S+), \+(\S+)\]; -8\.0 points compared with the teacher \[-(\S+), -(\S+)\]\.",
        said,
    )
    assert bounds is not None
    # A difference of paired hits is a share of 0.1, or 0.08, of 1,000 queries.
    expected = [10 - 1.96 * 0.949, 10 + 1.96 * 0.949, 8 + 1.96 * 0.858, 8 - 1.96 * 0.858]
    assert [float(bound) for bound in bounds.groups()] == pytest.approx(expected, abs=0.25)


def test_no_gap() -> None:
    run, shown = run_of(TOP1, 0.3, 0.3, 0.4), scores("bank train top-1", 30, 40, 30, 300)
    assert [*verdicts(run)] == [f"On set, there is no teacher gap to close. {shown} {COSTS}"]


def test_resamples_without_a_gap_are_counted() -> None:
    """A teacher with one hit more has none in each e-th resample."""
    run = run_of(TOP1, 0.201, 0.2, 0.2)
    said = re.search(
        r" closes 0 % .* interval 0 to 0( \((\d+) of 2,000 resamples have no gap\))\. ", next(verdicts(run))
    )
    assert said is not None
    assert int(said[2]) == pytest.approx(2000 / math.e, rel=0.1)
    [(title, rows)] = accuracy_tables(run.results, ["set"], run.primary)
    assert title == "Zero-shot retrieval on set, layer_mean_cls, batch 300, accuracy in % [95 % interval]"
    assert rows[-1][:2] == ["teacher gap closed", f"0.0 [0.0, 0.0]{said[1]}"]


def test_nothing_is_said_of_what_was_not_measured() -> None:
    run = run_of(TOP1, 0.6, 0.2, 0.4)
    assert [*verdicts(run._replace(results=[result for result in run.results if result.row != UNTRAINED]))] == []


def test_the_table_of_a_study_compares_each_row_with_its_own_baselines() -> None:
    def log_of(**top1: list[float]) -> dict[str, dict[int, float]]:
        log = {"loss/train/total": {0: 2.0, 1: 1.0}, "time/sample": {1: 64.0}}
        for bank, embedding, row in product(BANKS, RAW_EMBEDDINGS[1:], top1):  # of a teacher without CLS
            log[metric_key("cifar10", retrieval_from(bank, 1), embedding, row)] = dict(enumerate(top1[row]))
        return log

    speed = {"throughput/samples_per_sec": {0: 8.0}}
    printed = study_table(
        {
            "base": log_of(student=[0.2, 0.3], teacher=[0.4]) | speed,
            "another depth": log_of(student=[0.2, 0.35]),
            "another reading": log_of(student=[0.1, 0.3], teacher=[0.35]),
        }
    )
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()]
    assert head == ["bank train / bank test", *RAW_EMBEDDINGS[1:], "loss", "s"]
    assert [row[:2] for row in rows] == [
        ["untrained student", "20.0 / 20.0"],
        ["base", "30.0 / 30.0 (50 %)"],
        ["another depth", "35.0 / 35.0 (75 %)"],
        ["another reading", "30.0 / 30.0 (80 %)"],
        ["– its untrained student", "10.0 / 10.0"],
        ["– its teacher", "35.0 / 35.0"],
        ["teacher", "40.0 / 40.0"],
    ]
    assert [row[-2:] for row in rows[1:3]] == [["1.500", "8"], ["1.500", "–"]]


def test_each_measure_is_a_line_through_the_models_in_order_of_speed() -> None:
    load: Any = None
    speeds: dict[int, dict[str, float]] = {1: {"fast": 3, "slow": 5}, 64: {"fast": 900, "slow": 30}}
    right = {"pixels": 10, "fast": 40, "slow": 60}
    measures = [retrieval_from("train", 1), retrieval_from("train", 3), LINEAR]
    results = [
        Result(row, dataset, measure, "output_mean", True, torch.arange(100) < hits + 10 * i)
        for row, hits in right.items()
        for i, measure in enumerate(measures)
        for dataset in ("first", "second")
    ]
    lookup = Lookup("output_mean", (1, 3), ["linear"], None, 64)
    evaluation = Evaluation({}, {}, lookup, load, {"first": [], "second": []}, results, speeds)
    figure = quality_over_speed(evaluation, 64, "images")
    assert [axes.get_title("left") for axes in figure.axes] == [
        f"Quality over speed on {name}, with 95 % intervals" for name in ("first", "second")
    ]
    for axes in figure.axes:
        containers: Any = axes.containers
        texts: Any = axes.texts
        lines = {container.get_label(): np.asarray(container.lines[0].get_xydata()) for container in containers}
        assert lines.keys() == {"bank train top-1", "linear probe"}
        assert lines["bank train top-1"] == pytest.approx(np.array([[30, 0.6], [900, 0.4]]))
        assert lines["linear probe"] == pytest.approx(np.array([[30, 0.8], [900, 0.6]]))
        assert {text.get_text(): text.xy[0] for text in texts} == {"slow": 30, "fast": 900}
        assert axes.get_xlabel() == "images per second on this machine, in batches of 64"
        assert axes.get_xscale() == "log"
