"""The table of a study's runs."""

from pathlib import Path

import pytest

from d2v_composer.evaluation.metrics import BANKS, EMBEDDINGS, metric_key
from d2v_composer.report.tables import DATASET, FinishedRun, study_table
from d2v_composer.system.errors import InputError

Log = dict[str, dict[int, float]]
TRAINED: Log = {"loss/train/total": {0: 1.0}, "time/sample": {0: 64}, "throughput/images_per_sec": {0: 8.0}}


def test_a_share_is_of_the_rows_own_teacher_if_it_measured_one() -> None:
    def finished(name: str, top1: dict[str | None, list[float]]) -> FinishedRun:
        log = {
            metric_key("cifar10", bank, 1, embedding, baseline): dict(enumerate(values))
            for bank in BANKS
            for embedding in EMBEDDINGS
            for baseline, values in top1.items()
        }
        return FinishedRun(
            name, {**log, "loss/train/total": {0: 1.0}, "time/sample": {0: 64}, "throughput/images_per_sec": {0: 8.0}}
        )

    printed = study_table(
        [
            finished("base", {None: [0.2, 0.3], "teacher": [0.4]}),
            finished("another depth", {None: [0.35]}),
            finished("another reading", {None: [0.1, 0.3], "teacher": [0.35]}),
        ]
    )
    cells = [[cell.strip() for cell in line.strip("|").split("|")[:2]] for line in printed.splitlines()[2:]]
    assert cells == [
        ["untrained", "20.0 / 20.0"],
        ["base", "30.0 / 30.0 (50 %)"],
        ["another depth", "35.0 / 35.0 (75 %)"],
        ["another reading", "30.0 / 30.0 (80 %)"],
        ["– its untrained", "10.0 / 10.0"],
        ["– its teacher", "35.0 / 35.0"],
        ["teacher", "40.0 / 40.0"],
    ]


def test_what_was_not_measured_is_a_dash() -> None:
    """A teacher without CLS, without the untrained student, and a run too short for its speed."""
    without_cls = [name for name in EMBEDDINGS if not name.endswith("_cls")]
    log: Log = {metric_key("cifar10", bank, 1, name): {5: 0.5} for bank in BANKS for name in without_cls}
    log |= {metric_key("cifar10", bank, 1, name, "teacher"): {5: 0.6} for bank in BANKS for name in without_cls}
    head, _, _, row, _ = study_table([FinishedRun("short", log | {"loss/train/total": {0: 1.0}})]).splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == [
        "bank train / bank test",
        *without_cls,
        "loss",
        "s",
    ]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "short",
        *["50.0 / 50.0 (–)"] * len(without_cls),
        "1.000",
        "–",
    ]


def test_a_run_without_a_log_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"log\.jsonl: no such file; a study's base\.yaml needs loggers"):
        FinishedRun.read("base", tmp_path)


def test_the_ablations_table_is_markdown() -> None:
    log: Log = {"loss/train/total": {0: 2.0, 1: 1.0}, "time/sample": {1: 10.0}, "throughput/images_per_sec": {1: 5.0}}
    for bank, untrained, trained, teacher in (("train", 0.25, 0.5, 0.75), ("test", 0.5, 0.75, 0.5)):
        for embedding in EMBEDDINGS:
            log[f"metrics/{DATASET}/bank_{bank}/top1/{embedding}"] = {0: untrained, 1: trained}
            log[f"metrics/{DATASET}/teacher/bank_{bank}/top1/{embedding}"] = {0: teacher}
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in study_table([FinishedRun("base", log)]).splitlines()
    ]
    assert rows[0] == ["bank train / bank test", *EMBEDDINGS, "loss", "s"]
    assert [row[:2] for row in rows[2:]] == [
        ["untrained", "25.0 / 50.0"],
        ["base", "50.0 / 75.0 (50 %)"],  # no gap with bank test
        ["teacher", "75.0 / 50.0"],
    ]
    assert rows[3][-2:] == ["1.500", "2"]
