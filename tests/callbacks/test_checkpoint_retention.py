"""Checkpoints: a full disk, an unreachable store, and the removal of outdated ones."""

import logging
import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from composer import Callback, State
from composer.loggers import Logger

from d2v_composer.callbacks.checkpointing import CheckpointRetention, outdated, prune_folder, prune_store
from d2v_composer.checkpoints.safe_load import LATEST
from gated_store import GatedStore
from helpers import (
    FORKED_UPLOADS,
    assert_same_student,
    checkpoints_of,
    has_trained,
    small_run,
    start_python,
    start_training,
    wait_until,
)
from recipes import train

BUCKET = "saved"


@pytest.fixture(scope="session")
def store(object_store: GatedStore) -> GatedStore:
    object_store.create_bucket(BUCKET)
    return object_store


class CrashAt(Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def batch_start(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == self.batch:
            raise ZeroDivisionError


@contextmanager
def files_limited_to(num_bytes: int) -> Iterator[None]:
    """Let writes beyond a file size fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("one_thread")
def test_a_full_disk_is_an_error_and_a_restart_gives_the_same_student(
    uninterrupted: Path, small_data: Path, tmp_path: Path
) -> None:
    """The older checkpoints stay as they were."""
    arguments = small_run(tmp_path, small_data)
    with pytest.raises(ZeroDivisionError):
        train.main(arguments, [CrashAt(9)])
    before = {name: (tmp_path / name).read_bytes() for name in checkpoints_of(tmp_path)}
    # A checkpoint has a megabyte.
    with files_limited_to(200 << 10), pytest.raises((OSError, RuntimeError), match=r"File too large|enforce fail"):
        train.main(arguments)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert (tmp_path / LATEST).readlink().name == "ep1-ba8-rank0.pt"
    train.main(arguments)
    assert_same_student(tmp_path, uninterrupted)
    assert checkpoints_of(tmp_path) == {"ep1-ba12-rank0.pt", "ep2-ba14-rank0.pt"}


def test_an_unreachable_store_is_waited_for_while_training_continues(
    store: GatedStore, uninterrupted: Path, small_data: Path, tmp_path: Path
) -> None:
    """Then the checkpoints are uploaded, and the outdated one is removed."""
    folder = tmp_path / "away"
    overrides = (f"save_folder=s3://{BUCKET}/away", "save_interval=7ba", "save_num_checkpoints_to_keep=1")
    command = [FORKED_UPLOADS, *small_run(Path("unused"), small_data, *overrides)]
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


@pytest.mark.slow
def test_a_later_run_on_another_machine_replaces_the_checkpoints_in_the_store(
    store: GatedStore, small_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "later"
    for duration, kept in (
        ("14ba", {"ep1-ba12-rank0.pt", "ep2-ba14-rank0.pt"}),
        ("20ba", {"ep2-ba18-rank0.pt", "ep3-ba20-rank0.pt"}),
    ):
        overrides = (f"save_folder=s3://{BUCKET}/later", f"max_duration={duration}")
        process = start_training(*overrides, data=small_data, cwd=tmp_path, environment=store.environment)
        assert process.wait(timeout=300) == 0, process.stderr
        assert {name for name in store.objects(BUCKET, "later/") if name.endswith(".pt")} == kept
        assert checkpoints_of(folder) == kept
        shutil.rmtree(folder)


@pytest.mark.slow
def test_sigterm_to_all_processes_still_uploads_the_checkpoint(
    store: GatedStore, uninterrupted: Path, small_data: Path, tmp_path: Path
) -> None:
    """Data workers and uploaders receive the signal as well, and another machine resumes."""
    overrides = (f"save_folder=s3://{BUCKET}/everyone", "save_interval=1000ba", "train_loader.num_workers=1")
    folder = tmp_path / "everyone"
    process = start_training(*overrides, data=small_data, cwd=tmp_path, environment=store.environment)
    wait_until(lambda: has_trained(folder), seconds=90)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=90) == 128 + signal.SIGTERM, process.stderr
    [name] = checkpoints_of(folder)
    stored = store.objects(BUCKET, "everyone/")
    assert stored[f"{LATEST}.symlink"].decode().strip() == f"everyone/{name}"
    assert stored[name] == (folder / name).read_bytes()
    assert stored["log.jsonl"] == (folder / "log.jsonl").read_bytes()

    shutil.rmtree(folder)  # as on another machine
    again = start_training(*overrides, data=small_data, cwd=tmp_path, environment=store.environment)
    assert again.wait(timeout=120) == 0, again.stderr
    assert_same_student(folder, uninterrupted)


def names_of(*batches: int) -> list[str]:
    return [f"ep0-ba{batch}-rank0.pt" for batch in batches]


def test_only_checkpoints_before_the_pointers_are_outdated() -> None:
    others = ["log.jsonl", LATEST, "student.pt", "ep0-ba5-rank1.pt", "ep0-ba5-rank0.pt.partial"]
    assert outdated(names_of(5, 100, 10, 20) + others, names_of(100)[0], 2) == names_of(10, 5)
    assert outdated(names_of(5, 10), names_of(10)[0], 2) == []
    # A newer one than the pointer's may be abandoned or not yet uploaded: it is kept, and does not count.
    assert outdated(names_of(5, 10, 20, 100), names_of(10)[0], 1) == names_of(5)
    # The checkpoint that the pointer names is missing.
    assert outdated(names_of(5, 10, 20), names_of(100)[0], 1) == []
    assert outdated(names_of(5, 10, 20), "student.pt", 1) == []


def test_pruning_a_folder_removes_checkpoints_of_earlier_processes(tmp_path: Path) -> None:
    for name in names_of(5, 10, 20, 30):
        (tmp_path / name).write_text("weights")
    prune_folder(tmp_path, 2)  # no pointer yet
    assert len(checkpoints_of(tmp_path)) == 4
    (tmp_path / LATEST).symlink_to(names_of(40)[0])
    prune_folder(tmp_path, 2)
    assert len(checkpoints_of(tmp_path)) == 4
    (tmp_path / LATEST).unlink()
    (tmp_path / LATEST).symlink_to(names_of(20)[0])
    prune_folder(tmp_path, 2)
    assert checkpoints_of(tmp_path) == set(names_of(10, 20, 30))


def test_pruning_a_store_leaves_other_folders_alone(store: GatedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in store.environment.items():
        monkeypatch.setenv(variable, value)
    client = store.client()
    for prefix in ("runs/a/", "runs/a/b/", "runs/ab/"):
        for name in names_of(5, 10, 20):
            client.put_object(Bucket=BUCKET, Key=prefix + name, Body=b"weights")
    prune_store(BUCKET, "runs/a", 1)  # no pointer yet
    assert len(store.objects(BUCKET, "runs/a")) == 9
    pointed_at = f"runs/a/{names_of(10)[0]}".encode()
    client.put_object(Bucket=BUCKET, Key=f"runs/a/{LATEST}.symlink", Body=pointed_at)
    prune_store(BUCKET, "runs/a", 1)
    kept = set(store.objects(BUCKET, "runs/a/"))
    assert kept == {*names_of(10, 20), f"{LATEST}.symlink", *(f"b/{name}" for name in names_of(5, 10, 20))}
    assert len(store.objects(BUCKET, "runs/ab/")) == 3

    store.create_bucket("root")
    for name in names_of(5, 10, 20):
        client.put_object(Bucket="root", Key=name, Body=b"weights")
    client.put_object(Bucket="root", Key=f"{LATEST}.symlink", Body=names_of(20)[0].encode())
    prune_store("root", "", 2)
    assert set(store.objects("root")) == {*names_of(10, 20), f"{LATEST}.symlink"}


def test_a_store_that_denies_deletion_gets_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not stop the run."""

    def forbidden(*_: object) -> None:
        raise PermissionError("AccessDenied: you may not")

    monkeypatch.setattr("d2v_composer.callbacks.checkpointing.prune_store", forbidden)
    retention = CheckpointRetention(Path("nowhere"), "runs/a", 2)
    with caplog.at_level(logging.WARNING):
        retention.prune_remote("bucket")
    assert caplog.messages == ["runs/a: could not remove its old checkpoints (AccessDenied: you may not)"]
