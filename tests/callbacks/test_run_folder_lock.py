"""One run in a folder at a time, and the end of a run whose folder is removed."""

import json
import os
import platform
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from d2v_composer.callbacks import GracefulStop, RunFolderLock
from d2v_composer.checkpoints.load import load_any
from d2v_composer.checkpoints.safe_load import LATEST
from d2v_composer.system.errors import InputError
from helpers import (
    ROOT,
    assert_same_student,
    checkpoints_of,
    command_environment,
    has_trained,
    small_run,
    start_training,
    train_command,
    wait_until,
)
from recipes import train


def test_a_second_run_in_a_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2v_composer.callbacks.checkpointing.LOCK_WAIT_SECONDS", 0.1)
    first = RunFolderLock(tmp_path, "s3://a/runs")
    this_one = f"or stop process {os.getpid()} of {platform.node()}$"
    with pytest.raises(InputError, match=f" is in use by another run: .*, {this_one}"):
        RunFolderLock(tmp_path, "s3://a/runs")
    first.post_close()
    RunFolderLock(tmp_path, "s3://a/runs").post_close()
    for remote, words in (("s3://b/runs", "s3://b/runs"), (None, "this run")):
        with pytest.raises(InputError, match=f"holds the files of s3://a/runs, not those of {words}"):
            RunFolderLock(tmp_path, remote)


@pytest.mark.parametrize("removed", ["", ".in_use", "replaced"])
def test_a_run_stops_when_its_folder_is_removed(tmp_path: Path, removed: str) -> None:
    """Without it there is no lock, log or record."""
    folder = tmp_path / "run"
    run_folder_lock, graceful_stop = RunFolderLock(folder), GracefulStop("5ba")
    state: Any = SimpleNamespace(
        callbacks=[run_folder_lock, graceful_stop], timestamp=SimpleNamespace(batch=3), max_duration=None
    )
    logger: Any = None
    try:
        graceful_stop.init(state, logger)
        graceful_stop.batch_end(state, logger)
        if removed == ".in_use":
            (folder / removed).unlink()
        else:
            shutil.rmtree(folder)
        if removed == "replaced":
            RunFolderLock(folder).post_close()
        with pytest.raises(InputError, match=r"run or its lock \.in_use was removed .* stopped after batch 2;"):
            graceful_stop.batch_end(state, logger)
    finally:
        graceful_stop.close(state, logger)
        run_folder_lock.post_close()


@pytest.mark.slow
def test_two_ranks_stop_when_their_folder_is_removed(small_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = train_command(small_run(folder, small_data, "max_duration=100000ba"), ranks=2)
    with (tmp_path / "output.txt").open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=command_environment(), stdout=file, stderr=file)
    wait_until(lambda: has_trained(folder), seconds=90)
    shutil.rmtree(folder)
    status, output = process.wait(timeout=90), (tmp_path / "output.txt").read_text()
    assert status == 2, output
    assert f"error: save_folder: {folder} or its lock .in_use was removed" in output
    assert "Traceback" not in output


@pytest.mark.usefixtures("one_thread")
def test_runs_share_a_data_set_but_no_folder(
    uninterrupted: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the newest checkpoint of a running one can be read at any time."""
    monkeypatch.setattr("d2v_composer.callbacks.checkpointing.LOCK_WAIT_SECONDS", 0.1)
    shared = tmp_path / "shared"
    endless = ("max_duration=100000ba", "save_interval=3ba", "save_num_checkpoints_to_keep=5")
    process = start_training(f"save_folder={shared}", *endless, data=small_data)
    wait_until(lambda: (shared / LATEST).exists(), seconds=90)

    train.main(small_run(tmp_path / "other", small_data))
    assert_same_student(tmp_path / "other", uninterrupted)

    with pytest.raises(InputError) as refused:
        train.main(small_run(shared, small_data, *endless))
    assert str(refused.value) == (
        f"save_folder: {shared} is in use by another run: choose another run_name or save_folder, "
        f"or stop process {process.pid} of {platform.node()}"
    )
    for _ in range(25):
        student, teacher = load_any(shared / LATEST)
        assert student is not None
        assert teacher is not None

    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM, process.stderr
    steps = [json.loads(line)["step"] for line in (shared / "log.jsonl").read_text().splitlines() if "loss/" in line]
    assert steps == list(range(len(steps)))  # written by one run
    assert len(checkpoints_of(shared)) == 5
