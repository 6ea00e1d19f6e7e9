"""Promises 10, 11 and 15 for ``save_best``: the checkpoint with the highest mean of top-1, whole and never resumed."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Run

from helpers import (
    assert_same_student,
    checkpoints_of,
    datasets_of,
    load_checkpoint,
    losses_of,
    run_command,
    run_ranks,
    small_run,
    succeed,
)

BEST = "best-rank0.pt"
MEAN = "metrics/mean/top1"
BestRun = Callable[[Path], Run]

EARLY_STOPPED = """
import sys

from composer.callbacks import EarlyStopper

from d2v_composer import load_config, train_student

if __name__ == "__main__":
    stopper = EarlyStopper("mean/top1", "retrieval", patience="3ba")
    print(train_student(load_config(sys.argv[1:]), [stopper]).state.timestamp.batch)
"""


@pytest.fixture(scope="module")
def options(labeled: Path) -> list[str]:
    """A retrieval after each batch, by a raw embedding, which needs no map; and one checkpoint to keep."""
    retrieval = f"retrieval.{datasets_of(labeled)}", "retrieval.baselines=[]", "retrieval.interval=1ba"
    return [*retrieval, "retrieval.pooling=mean", "save_num_checkpoints_to_keep=1"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, small_data: Path, options: list[str]) -> Run:
    run = Run(tmp_path_factory.mktemp("best") / "run", small_data, *options, "save_best=true")
    run.train()
    return run


def best_of(run: Run, first: int = 0) -> int:
    """Return the batch of the highest mean in a run's log, from a batch on; of equal ones, the first."""
    means = {batch: mean for batch, mean in run.log[MEAN].items() if batch >= first}
    return max(means, key=lambda batch: means[batch])


def saved_in(path: Path) -> dict[str, Any]:
    state = load_checkpoint(path)["state"]
    return {"batch": int(state["timestamp"]["Timestamp"]["batch"]), "map": state["callbacks"]["AlignStudent"]}


def test_the_best_checkpoint_is_of_the_highest_mean_and_has_its_map(
    undisturbed: Run, labeled: Path, tmp_path: Path
) -> None:
    """Promise 15: the newest one is kept beside it; commands read it like any other."""
    path, best = undisturbed.folder / BEST, best_of(undisturbed)
    assert 0 < best < 14
    saved = saved_in(path)
    assert (saved["batch"], saved["map"]["batch"]) == (best, best)
    assert {"weight", "bias"} <= saved["map"].keys()
    assert checkpoints_of(undisturbed.folder) == {"ep2-ba14-rank0.pt"}
    succeed("export", path, tmp_path / "student.safetensors")
    accuracy = undisturbed.log["metrics/small/bank_test/top1"][best]
    table = succeed(
        "evaluate", f"model={tmp_path / 'student.safetensors'}", datasets_of(labeled), "pooling=mean"
    ).stdout
    assert f"{100 * accuracy:.1f} [" in table


def test_a_resume_remembers_the_best_and_goes_on_from_the_newest(
    undisturbed: Run, small_data: Path, options: list[str], tmp_path: Path
) -> None:
    run, best = Run(tmp_path / "run", small_data, *options, "save_best=true"), best_of(undisturbed)
    run.train_until_killed(f"batch_start {best + 4}")
    before, newest = (run.folder / BEST).read_bytes(), saved_in(run.newest)["batch"]
    assert newest > best
    assert f" at batch {newest}\n" in run.train().stdout
    assert (run.folder / BEST).read_bytes() == before
    assert_same_student(run.folder, undisturbed.folder)
    assert run.log[MEAN] == undisturbed.log[MEAN]
    for name in (*checkpoints_of(run.folder), run.newest.name):
        (run.folder / name).unlink()
    assert "resumed" not in run.train("max_duration=2ba", "scheduler.t_warmup=1ba").stdout
    assert saved_in(run.folder / BEST)["batch"] == best_of(run)


def test_a_kill_while_the_best_is_written_leaves_the_one_before(
    small_data: Path, options: list[str], tmp_path: Path
) -> None:
    """Until batch 3, the run keeps no best one, so the next measurement is the best."""
    run = Run(tmp_path / "run", small_data, *options)
    run.train_until_killed("batch_start 3")
    shutil.copy(run.newest, run.folder / BEST)
    before, on = (run.folder / BEST).read_bytes(), "save_best=true"
    hanging = run.start_until("hangs", on, HANG="torch.serialization _open_zipfile_writer_buffer __exit__")
    hanging.kill()
    hanging.wait(30)
    assert (run.folder / "checkpoint.partial").exists()
    assert (run.folder / BEST).read_bytes() == before
    run.train(on)
    assert saved_in(run.folder / BEST)["batch"] == best_of(run, first=3)
    assert not (run.folder / "checkpoint.partial").exists()


def test_a_run_that_a_retrieval_stops_ends_with_its_map(small_data: Path, options: list[str], tmp_path: Path) -> None:
    run, script = Run(tmp_path / "run", small_data, *options), tmp_path / "stopped.py"
    script.write_text(EARLY_STOPPED)
    ended = run_command(sys.executable, script, *run.arguments, "max_duration=100000ba", "save_interval=100ba")
    assert ended.returncode == 0, ended.stderr
    last = best_of(run) + 4
    saved = saved_in(run.newest)
    assert (saved["batch"], saved["map"]["batch"]) == (last, last)


@pytest.mark.slow
def test_two_ranks_keep_the_best_and_stop_early(small_data: Path, options: list[str], tmp_path: Path) -> None:
    run, script = Run(tmp_path / "run", small_data, *options), tmp_path / "stopped.py"
    script.write_text(EARLY_STOPPED)
    overrides = ("save_best=true", "max_duration=100000ba", "train_loader.num_workers=1")
    run_ranks(script, *small_run(run.folder, small_data, *options, *overrides))
    last, best = max(losses_of(run.folder)) + 1, best_of(run)
    assert last == best + 4
    assert saved_in(run.newest)["batch"] == last
    saved = saved_in(run.folder / BEST)
    assert (saved["batch"], saved["map"]["batch"]) == (best, best)
    assert torch.isfinite(saved["map"]["weight"]).all()
