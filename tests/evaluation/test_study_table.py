"""The table of a study's runs."""

from pathlib import Path

import pytest

from d2v_composer.evaluation.metric_names import BANKS, EMBEDDINGS, metric_key
from d2v_composer.evaluation.study_table import FinishedRun, study_table
from d2v_composer.system.errors import InputError

Log = dict[str, dict[int, float]]
TRAINED: Log = {"loss/train/total": {0: 1.0}, "time/sample": {0: 64}, "throughput/images_per_sec": {0: 8.0}}


def test_a_share_is_of_the_rows_own_teacher_if_it_measured_one() -> None:
    def finished(name: str, top1: dict[str | None, list[float]]) -> FinishedRun:
        log = {
            metric_key("cifar10", bank, 1, embedding, reference): dict(enumerate(values))
            for bank in BANKS
            for embedding in EMBEDDINGS
            for reference, values in top1.items()
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
        ["base", "30.0 / 30.0 (50 %)"],
        ["– untrained", "20.0 / 20.0"],
        ["– teacher", "40.0 / 40.0"],
        ["another depth", "35.0 / 35.0 (75 %)"],
        ["another reading", "30.0 / 30.0 (80 %)"],
        ["– untrained", "10.0 / 10.0"],
        ["– teacher", "35.0 / 35.0"],
    ]


def test_what_was_not_measured_is_a_dash() -> None:
    """A teacher without CLS, without the untrained student, and a run too short for its speed."""
    without_cls = [name for name in EMBEDDINGS if not name.endswith("_cls")]
    log: Log = {metric_key("cifar10", bank, 1, name): {5: 0.5} for bank in BANKS for name in without_cls}
    log |= {metric_key("cifar10", bank, 1, name, "teacher"): {5: 0.6} for bank in BANKS for name in without_cls}
    head, _, row = study_table([FinishedRun("short", log | {"loss/train/total": {0: 1.0}})]).splitlines()
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
