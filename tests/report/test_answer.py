"""The verdict on a student, with its advice by the curve's slope; a study's table; the plot of quality over speed."""

import re
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from d2v_composer.evaluation.evaluate import Evaluation
from d2v_composer.evaluation.metrics import RETRIEVAL, agreement, linear
from d2v_composer.evaluation.metrics.metric import BANKS, Column
from d2v_composer.evaluation.metrics.retrieval import retrieval_from
from d2v_composer.evaluation.results import Result, are_comparable
from d2v_composer.evaluation.rows import GAP, IN_INDEX, UNTRAINED, metric_key
from d2v_composer.evaluation.settings import Settings
from d2v_composer.models.alignment import EmbeddingInfo
from d2v_composer.models.names import EMBEDDING, RAW_EMBEDDINGS
from d2v_composer.report.plots import quality_over_speed
from d2v_composer.report.run import Run, verdicts
from d2v_composer.report.tables import accuracy_tables, format_tables, study_table

TOP1 = retrieval_from("train", 1)
[AGREEMENT], [LINEAR] = (metric.columns((), {}) for metric in (agreement, linear))
FLAT = "smaller batches for the same number of samples: the curve is flat."
INFO = EmbeddingInfo("output_mean", "alignment", 8, "of the map", "of the teacher")


def result_of(row: str, column: Column, hits: torch.Tensor, batch: int = 0, dataset: str = "set") -> Result:
    info = INFO._replace(made_by="teacher", fingerprint="") if row == "teacher" else INFO
    return Result(row, dataset, column, EMBEDDING, info, True, hits, batch=batch)


def run_of(column: Column, teacher: float, *curve: float, model: str | None = None, queries: int = 4000) -> Run:
    """A run whose student was measured every 300 batches, on queries of which the first are hits."""
    config = {"retrieval": {"datasets": {"set": {}}, "ks": [3, 1]}, "student": {"model": model}}
    log = {metric_key("set", column): {300 * i: value for i, value in enumerate(curve)}}
    last = 300 * (len(curve) - 1)
    results = [
        result_of(row, column, torch.arange(queries) < round(queries * value), last)
        for row, value in zip(GAP, (curve[0], curve[-1], teacher), strict=True)
    ]
    return Run({"config": config, "data": {"modality": "image"}}, log, {}, results)


def closed(run: Run) -> str:
    """Return the gap closed as the table has it."""
    [(_, lines)] = accuracy_tables(run.results, ["set"])
    assert lines[-1][0] == "teacher gap closed"
    return lines[-1][1]


def scores(column: str, untrained: float, student: float, teacher: float) -> tuple[str, str]:
    return (
        f"On set, the student scores {student:.1f} %, and its teacher {teacher:.1f} % ({column})",
        f"the untrained student's {untrained:.1f} %",
    )


@pytest.mark.parametrize(
    ("curve", "model", "advice"),
    [
        ((0.2, 0.3, 0.4), None, "Train the student longer: the curve still rises."),
        ((0.2, 0.396, 0.4), None, f"Try a larger teacher.first_blocks, or {FLAT}"),
        ((0.2, 0.408, 0.4), "timm/resnet18", f"Try {FLAT}"),
        (
            (0.2, 0.15, 0.2),
            None,
            "Train the student longer: so far, it is not clearly better than the untrained student.",
        ),
        ((0.2, 0.5, 0.58), None, "Export or fine-tune the student: it has come most of the way to its teacher."),
    ],
    ids=["rising", "flat", "a CNN, falling", "as untrained", "enough"],
)
def test_a_student_with_labels(curve: tuple[float, ...], model: str | None, advice: str) -> None:
    run = run_of(TOP1, 0.6, *curve, model=model)
    assert closed(run).startswith(f"{100 * (curve[-1] - 0.2) / 0.4:.0f} [")
    shown, from_untrained = scores("bank train top-1", 20, 100 * curve[-1], 60)
    expected = [f"{shown}; that is {closed(run)} % of the way from {from_untrained} to the teacher. {advice}"]
    assert [*verdicts(run)] == expected
    # An interrupted run logged more, after its checkpoint.
    assert [*verdicts(run._replace(log={key: {**values, 900: 0.9} for key, values in run.log.items()}))] == expected


def test_a_student_without_labels() -> None:
    run = run_of(AGREEMENT, 1.0, 0.2, 0.5, 0.56)
    shown, from_untrained = scores("neighbor agreement", 20, 56, 100)
    way = f"that is {closed(run)} % of the way from {from_untrained} to the teacher"
    assert [*verdicts(run)] == [f"{shown}; {way}. Train the student longer: the curve still rises."]


def test_a_student_in_its_teachers_index() -> None:
    """Each number of the verdict is one of the table's."""
    run = run_of(TOP1, 0.6, 0.2, 0.4)
    in_index = result_of(IN_INDEX, TOP1, torch.arange(4000) < 2000, 300)
    run = run._replace(results=[*run.results, in_index])
    [said], [(title, [_, *lines])] = verdicts(run), accuracy_tables(run.results, ["set"])
    assert title == "Zero-shot retrieval on set, embedding: the teacher's output_mean, batch 300"
    rows = [row for row, _ in lines]
    assert rows == ["untrained student", "student", in_index.row, "teacher", "teacher gap closed"]
    assert said.startswith(
        "On set, the student scores 50.0 % in its teacher's index, where the teacher scores 60.0 % (bank train top-1); "
        f"in its own index, the student scores 40.0 %; that is {closed(run)} % of the way from the untrained student's "
        "20.0 % to "
    )
    numbers = {number for _, cell in lines for number in re.findall(r"-?\d+\.\d", cell)}
    assert {*re.findall(r"-?\d+\.\d", said)} <= numbers
    columns = RETRIEVAL.columns((1, 3), {})
    table = format_tables([result._replace(column=column) for result in run.results for column in columns], ["set"])
    assert "bank test top-3" in table
    assert max(map(len, table.splitlines())) <= 100


def test_numbers_of_two_embeddings_are_not_in_one_sentence() -> None:
    """A run whose tables are by a raw embedding still has its student in its teacher's index, by the map."""
    run = run_of(TOP1, 0.6, 0.2, 0.4)
    raw = [
        result._replace(embedding="output_cls", info=EmbeddingInfo("output_cls", "raw", 8, ""))
        for result in run.results
    ]
    in_index = result_of(IN_INDEX, TOP1, torch.arange(4000) < 2200, 300)
    [said] = verdicts(run._replace(results=[*raw, in_index]))
    shown, from_untrained = scores("bank train top-1", 20, 40, 60)
    assert said.startswith(shown)
    assert from_untrained in said
    assert "55.0" not in said


def test_a_teacher_that_is_no_better_leaves_no_gap_to_close() -> None:
    run = run_of(TOP1, 0.3, 0.3, 0.4)
    assert closed(run) == "–"
    shown, _ = scores("bank train top-1", 30, 40, 30)
    assert [*verdicts(run)] == [
        f"{shown}; the teacher is no better than the untrained student (30.0 %). "
        "Measure the student on other images, or train it with another teacher."
    ]


@pytest.mark.parametrize(("queries", "teacher"), [(40, 0.3), (400, 0.21)])
def test_too_few_queries_make_no_percentage(queries: int, teacher: float) -> None:
    run = run_of(TOP1, teacher, 0.2, 0.25, queries=queries)
    assert closed(run) == "–"
    [said] = verdicts(run)
    doubt = re.search(
        rf"; {queries} images are too few .*\(([\d,]+) or more would be enough\)\. Measure the student on more test",
        said,
    )
    assert doubt is not None
    enough = int(doubt[1].replace(",", ""))
    assert enough > queries
    assert closed(run_of(TOP1, teacher, 0.2, 0.25, queries=2 * enough)) != "–"
    [said] = verdicts(run_of(TOP1, teacher, 0.2, 0.15, queries=queries))
    assert "too few" in said
    assert said.endswith("Train the student longer: so far, it is not clearly better than the untrained student.")


@pytest.mark.parametrize("change", ["of", "made_by", "space"])
def test_no_gap_is_formed_across_embeddings(change: str) -> None:
    run = run_of(TOP1, 0.6, 0.2, 0.4)
    untrained, *others = run.results
    other = {"of": "output_cls", "made_by": "raw", "space": "of another teacher"}[change]
    results = [untrained._replace(info=untrained.info._replace(**{change: other})), *others]
    assert are_comparable(*run.results)
    assert not are_comparable(*results)
    [(_, [_, *lines])] = accuracy_tables(results, ["set"])
    shown = {"of": " (the teacher's output_cls)", "made_by": " (raw)", "space": ""}[change]
    assert [row for row, _ in lines] == [f"untrained student{shown}", "student", "teacher"]
    assert [*verdicts(run._replace(results=results))] == []


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
    sets: Any = dict.fromkeys(("first", "second"))
    speeds: dict[int, dict[str, float]] = {1: {"fast": 3, "slow": 5}, 64: {"fast": 900, "slow": 30}}
    right = {"pixels": 10, "fast": 40, "slow": 60}
    columns = [retrieval_from("train", 1), retrieval_from("train", 3), LINEAR]
    results = [
        result_of(row, column, torch.arange(100) < hits + 10 * i, dataset=dataset)
        for row, hits in right.items()
        for i, column in enumerate(columns)
        for dataset in ("first", "second")
    ]
    settings = Settings("output_mean", (1, 3), ["linear"], None, 64)
    evaluation = Evaluation({}, {}, settings, {}, {}, load, datasets=sets, results=results, speeds=speeds)
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
