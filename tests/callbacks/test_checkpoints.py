"""Checkpoints: what is kept locally and in S3, uploads, signals during a retrieval, and one run a folder at a time."""

import errno
import logging
import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.core import Precision

from d2v_composer.callbacks import ZeroShotRetrieval
from d2v_composer.callbacks.checkpointing import Checkpoints, FolderLock, outdated, prune_store
from d2v_composer.callbacks.logging import Uploads
from d2v_composer.checkpoints.safe_load import LATEST
from d2v_composer.system import processes
from d2v_composer.system.addresses import RunFolder
from d2v_composer.system.errors import InputError, RunError
from gated_store import GatedStore
from helpers import (
    ROOT,
    assert_same_student,
    command_environment,
    has_trained,
    small_run,
    start_python,
    train_command,
    wait_until,
)

BUCKET = "saved"


@pytest.fixture(scope="session")
def store(object_store: GatedStore) -> GatedStore:
    object_store.create_bucket(BUCKET)
    return object_store


def names_of(*batches: int) -> list[str]:
    return [f"ep0-ba{batch}-rank0.pt" for batch in batches]


def test_only_checkpoints_before_the_pointers_are_outdated() -> None:
    others = ["log.jsonl", LATEST, "student.pt", "ep0-ba5-rank1.pt", "checkpoint.partial"]
    assert outdated(names_of(5, 100, 10, 20) + others, names_of(100)[0], 2) == names_of(10, 5)
    assert outdated(names_of(5, 10), names_of(10)[0], 2) == []
    assert outdated(names_of(5, 10), names_of(10)[0], -1) == []
    # A newer one than the pointer's is of the run before a restart: it is kept, and does not count.
    assert outdated(names_of(5, 10, 20, 100), names_of(10)[0], 1) == names_of(5)


def test_pruning_a_store_leaves_other_folders_alone(
    store: GatedStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A user who may not delete gets a warning: it must not stop the run."""
    client = store.client()
    for prefix in ("runs/a/", "runs/a/b/", "runs/ab/", ""):
        for name in names_of(5, 10, 20):
            client.put_object(Bucket=BUCKET, Key=prefix + name, Body=b"weights")
    for variable, value in store.reader_environment.items():
        monkeypatch.setenv(variable, value)
    with caplog.at_level(logging.WARNING):
        prune_store(f"s3://{BUCKET}/runs/a", names_of(10)[0], 1)
    assert caplog.messages[0].startswith(f"s3://{BUCKET}/runs/a: could not remove its old checkpoints (")
    assert len(store.objects(BUCKET, "runs/a")) == 9

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", store.environment["AWS_ACCESS_KEY_ID"])
    prune_store(f"s3://{BUCKET}/runs/a", names_of(10)[0], 1)
    assert set(store.objects(BUCKET, "runs/a/")) == {*names_of(10, 20), *(f"b/{name}" for name in names_of(5, 10, 20))}
    assert len(store.objects(BUCKET, "runs/ab/")) == 3
    prune_store(f"s3://{BUCKET}", names_of(20)[0], 2)
    assert {name for name in store.objects(BUCKET) if "/" not in name} == set(names_of(10, 20))


def test_an_unreachable_store_is_waited_for_while_training_continues(
    store: GatedStore, uninterrupted: Path, small_data: Path, tmp_path: Path
) -> None:
    """Then the checkpoints are uploaded, and the outdated one is removed."""
    folder = tmp_path / "away"
    overrides = (f"save_folder=s3://{BUCKET}/away", "save_interval=7ba", "save_num_checkpoints_to_keep=1")
    command = train_command(small_run(Path("unused"), small_data, *overrides))[1:]
    process = start_python(*command, cwd=tmp_path, environment=store.environment)
    wait_until(lambda: has_trained(folder), seconds=90)
    with store.unreachable():
        wait_until(lambda: (folder / "ep2-ba14-rank0.pt").is_file(), seconds=90)
        time.sleep(5)  # Composer's own uploader fails after seconds
        assert process.poll() is None
    assert process.wait(timeout=90) == 0, process.stderr
    stored = store.objects(BUCKET, "away/")
    assert stored[f"{LATEST}.symlink"].decode().strip() == "away/ep2-ba14-rank0.pt"
    assert stored["ep2-ba14-rank0.pt"] == (folder / "ep2-ba14-rank0.pt").read_bytes()
    assert stored["log.jsonl"] == (folder / "log.jsonl").read_bytes()
    assert [name for name in stored if name.endswith(".pt")] == ["ep2-ba14-rank0.pt"]
    assert_same_student(folder, uninterrupted)


def test_a_failed_upload_ends_the_run_and_gives_up_the_others(caplog: pytest.LogCaptureFixture) -> None:
    uploads, done = Uploads("s3://bucket/run"), []

    def fail() -> None:
        raise RunError("s3://bucket/run: cannot be written")

    for task in (partial(done.append, 1), fail, partial(done.append, 2)):
        uploads.start(task)
    with pytest.raises(RunError, match="cannot be written"):
        uploads.wait()
    uploads.start(done.append, 3)
    uploads.post_close()
    assert done == [1]
    again = Uploads("s3://bucket/run")
    again.start(fail)
    again.post_close()  # it must not hide why a run failed
    assert caplog.messages == ["s3://bucket/run: cannot be written"]


def test_a_second_close_uploads_nothing(tmp_path: Path) -> None:
    """Composer closes callbacks again at exit, when no thread can start."""
    uploads = Uploads("s3://bucket/run")
    nothing: Any = None
    checkpoints = Checkpoints(RunFolder(tmp_path, uploads.address), "5ba", uploads=uploads)
    checkpoints.close(nothing, nothing)
    uploads.thread.shutdown()
    checkpoints.close(nothing, nothing)
    checkpoints.post_close()
    uploads.post_close()


LAST_BATCH = 5


class Timestamp(int):
    """The number of a batch, as Composer gives it."""

    @property
    def batch(self) -> int:
        return int(self)


class Run:
    """A run of one rank with one retrieval, which does something while it measures and while it logs the accuracy."""

    def __init__(self) -> None:
        self.stop, self.retrieval = Checkpoints(None, "1000ba"), ZeroShotRetrieval({}, embed=lambda images: images)
        self.while_measuring: Callable[[], object] = int
        self.while_logging: Callable[[], object] = int
        self.logged: list[dict[str, float]] = []
        self.retrieval.datasets = {"small": None}  # type: ignore[dict-item]
        self.retrieval.measure_set = self.measure_set
        self.state: Any = SimpleNamespace(
            callbacks=[self.stop, self.retrieval],
            model=torch.nn.Identity(),
            fsdp_enabled=False,
            precision=Precision.FP32,
            precision_config=None,
            max_duration=LAST_BATCH,
        )
        self.stop.init(self.state, self.logger)

    @property
    def logger(self) -> Any:
        return SimpleNamespace(log_metrics=self.log_metrics)

    def measure_set(self, dataset: str, embeds: Any, state: Any) -> Iterator[tuple[str | None, str, float]]:
        self.retrieval.stop_if_asked()
        self.while_measuring()
        self.retrieval.stop_if_asked()
        yield None, "accuracy", 0.5

    def log_metrics(self, metrics: dict[str, float]) -> None:
        self.while_logging()
        self.logged.append(metrics)

    def end_batch(self, batch: int) -> None:
        self.state.timestamp = Timestamp(batch)
        self.stop.batch_end(self.state, self.logger)
        self.retrieval.evaluate(self.state, self.logger)


@pytest.fixture
def run() -> Iterator[Run]:
    yield Run()
    processes.forget_signals()


def test_a_signal_cuts_a_measurement_short_and_nothing_else(run: Run) -> None:
    run.while_logging = lambda: signal.raise_signal(signal.SIGTERM)
    run.end_batch(3)
    assert not run.retrieval.was_stopped
    assert [entry["batch"] for entry in run.retrieval.history] == [3]
    assert [list(metrics) for metrics in run.logged] == [["time/zero_shot_retrieval"], ["accuracy"]]
    run.end_batch(4)
    assert run.stop.stopped_by == signal.SIGTERM
    assert run.retrieval.was_stopped
    assert len(run.logged) == 2


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_in_the_last_batch_the_retrieval_is_finished_and_the_run_exits(run: Run, signum: signal.Signals) -> None:
    run.while_measuring = lambda: signal.raise_signal(signum)
    run.end_batch(LAST_BATCH)
    assert [entry["batch"] for entry in run.retrieval.history] == [LAST_BATCH]
    assert not run.retrieval.was_stopped
    with pytest.raises(SystemExit) as ended:
        run.stop.end_training(run.state)
    assert ended.value.code == 128 + signum


def test_before_the_first_batch_and_after_the_last_the_programs_own_handlers_are_in_place(run: Run) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run.end_batch(LAST_BATCH)
    assert signal.getsignal(signal.SIGTERM) != before
    run.stop.end_training(run.state)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_run_in_a_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2v_composer.callbacks.checkpointing.LOCK_WAIT_SECONDS", 0.1)
    first = Checkpoints(RunFolder(tmp_path, "s3://a/runs"), "5ba")
    this_one = f"or stop process {os.getpid()} of {platform.node()}$"
    with pytest.raises(InputError, match=f" is in use by another run: .*, {this_one}"):
        Checkpoints(RunFolder(tmp_path, "s3://a/runs"), "5ba")
    first.post_close()
    Checkpoints(RunFolder(tmp_path, "s3://a/runs"), "5ba").post_close()
    for address, words in (("s3://b/runs", "s3://b/runs"), (None, "this run")):
        with pytest.raises(InputError, match=f"holds the files of s3://a/runs, not those of {words}"):
            Checkpoints(RunFolder(tmp_path, address), "5ba")


@pytest.mark.parametrize("removed", ["", ".in_use", "replaced"])
def test_a_run_stops_when_its_folder_is_removed(tmp_path: Path, removed: str) -> None:
    """Without it there is no lock, log or record."""
    folder = tmp_path / "run"
    checkpoints = Checkpoints(RunFolder(folder), "5ba")
    state: Any = SimpleNamespace(callbacks=[], timestamp=SimpleNamespace(batch=3), max_duration=None)
    logger: Any = None
    try:
        checkpoints.batch_end(state, logger)
        if removed == ".in_use":
            (folder / removed).unlink()
        else:
            shutil.rmtree(folder)
        if removed == "replaced":
            Checkpoints(RunFolder(folder), "5ba").post_close()
        with pytest.raises(RunError, match=r"run or its lock \.in_use was removed .* stopped after batch 2;"):
            checkpoints.batch_end(state, logger)
    finally:
        checkpoints.close(state, logger)
        checkpoints.post_close()


def test_a_file_system_that_is_away_for_a_moment_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_away(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    lock = FolderLock(RunFolder(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", is_away)
        assert not lock.is_removed()
    lock.release()


@pytest.mark.slow
def test_two_ranks_stop_when_their_folder_is_removed(small_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = train_command(small_run(folder, small_data, "max_duration=100000ba"), ranks=2)
    with (tmp_path / "output.txt").open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=command_environment(), stdout=file, stderr=file)
    wait_until(lambda: has_trained(folder), seconds=90)
    shutil.rmtree(folder)
    status, output = process.wait(timeout=90), (tmp_path / "output.txt").read_text()
    assert status == 1, output
    assert f"error: save_folder: {folder} or its lock .in_use was removed" in output
    assert "Traceback" not in output
