"""Saving: a full disk, an unreachable store, outdated checkpoints, and two runs at a time."""

import json
import logging
import os
import platform
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer import Callback, State
from composer.callbacks import CheckpointSaver
from composer.loggers import Logger

from d2v_composer.benchmarks.object_store import ObjectStore
from d2v_composer.builders.callbacks import build_loggers
from d2v_composer.callbacks import GracefulStop, JSONLLogger, RunFolderLock
from d2v_composer.callbacks.checkpoint_retention import CheckpointRetention, outdated, prune_folder, prune_store
from d2v_composer.checkpoints import load
from d2v_composer.checkpoints.load import load_any
from d2v_composer.checkpoints.resume import LATEST
from d2v_composer.config.load import load_config
from d2v_composer.system.errors import InputError
from helpers import ROOT, checkpoints_of, command_environment, run_command, small_run, student_of, train_command
from recipes import train

BUCKET = "saved"


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with ObjectStore() as store:
        store.create_bucket(BUCKET)
        yield store


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for torch, as in the subprocesses, so that runs in this process give the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(command: list[str], cwd: Path = ROOT, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    variables = command_environment() | (environment or {})
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_trained(folder: Path) -> bool:
    log = folder / "log.jsonl"
    return log.exists() and "loss/train/total" in log.read_text()


def assert_same_student(folder: Path, expected: Path) -> None:
    ours, theirs = student_of(folder), student_of(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


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
    store: ObjectStore, uninterrupted: Path, small_data: Path, tmp_path: Path
) -> None:
    """Then the checkpoint is uploaded, and the outdated ones are removed."""
    folder = tmp_path / "away"
    command = train_command(small_run(Path("unused"), small_data, f"save_folder=s3://{BUCKET}/away"))
    process = start(command, tmp_path, store.environment)
    wait_until(lambda: has_trained(folder), process)
    store.kill()
    wait_until(lambda: (folder / "ep2-ba14-rank0.pt").is_file(), process)
    time.sleep(5)  # Composer's own uploader fails after seconds
    assert process.poll() is None
    store.start()
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    stored = store.objects(BUCKET, "away/")
    assert stored[f"{LATEST}.symlink"].decode().strip() == "away/ep2-ba14-rank0.pt"
    assert stored["ep2-ba14-rank0.pt"] == (folder / "ep2-ba14-rank0.pt").read_bytes()
    assert stored["log.jsonl"] == (folder / "log.jsonl").read_bytes()
    assert {name for name in stored if name.endswith(".pt")} == {"ep1-ba12-rank0.pt", "ep2-ba14-rank0.pt"}
    assert_same_student(folder, uninterrupted)


@pytest.mark.slow
def test_a_later_run_on_another_machine_replaces_the_checkpoints_in_the_store(
    store: ObjectStore, small_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "later"
    for duration, kept in (
        ("14ba", {"ep1-ba12-rank0.pt", "ep2-ba14-rank0.pt"}),
        ("20ba", {"ep2-ba18-rank0.pt", "ep3-ba20-rank0.pt"}),
    ):
        overrides = (f"save_folder=s3://{BUCKET}/later", f"max_duration={duration}")
        command = train_command(small_run(Path("unused"), small_data, *overrides))
        ended = run_command(*command, cwd=tmp_path, environment=store.environment, timeout=300)
        assert ended.returncode == 0, ended.stderr
        assert {name for name in store.objects(BUCKET, "later/") if name.endswith(".pt")} == kept
        assert checkpoints_of(folder) == kept
        shutil.rmtree(folder)


@pytest.mark.slow
def test_sigterm_to_all_processes_still_uploads_the_checkpoint(
    store: ObjectStore, uninterrupted: Path, small_data: Path, tmp_path: Path
) -> None:
    """Data workers and uploaders receive the signal as well, and another machine resumes."""
    options = ("save_interval=1000ba", "train_loader.num_workers=1")
    arguments = small_run(Path("unused"), small_data, f"save_folder=s3://{BUCKET}/everyone", *options)
    command, folder = train_command(arguments), tmp_path / "everyone"
    process = start(command, tmp_path, store.environment)
    wait_until(lambda: has_trained(folder), process)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 128 + signal.SIGTERM, output
    [name] = checkpoints_of(folder)
    stored = store.objects(BUCKET, "everyone/")
    assert stored[f"{LATEST}.symlink"].decode().strip() == f"everyone/{name}"
    assert stored[name] == (folder / name).read_bytes()
    assert stored["log.jsonl"] == (folder / "log.jsonl").read_bytes()

    shutil.rmtree(folder)  # as on another machine
    again = run_command(*command, cwd=tmp_path, environment=store.environment)
    assert again.returncode == 0, again.stderr
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


def test_pruning_a_store_leaves_other_folders_alone(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
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

    monkeypatch.setattr("d2v_composer.callbacks.checkpoint_retention.prune_store", forbidden)
    retention = CheckpointRetention(Path("nowhere"), "runs/a", 2)
    with caplog.at_level(logging.WARNING):
        retention.prune_remote("bucket")
    assert caplog.messages == ["runs/a: could not remove its old checkpoints (AccessDenied: you may not)"]


def test_a_second_run_in_a_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2v_composer.callbacks.run_folder_lock.LOCK_WAIT_SECONDS", 0.1)
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
    state: Any = SimpleNamespace(callbacks=[run_folder_lock, graceful_stop], timestamp=SimpleNamespace(batch=3))
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
    process = start(train_command(small_run(folder, small_data, "max_duration=100000ba"), ranks=2))
    wait_until(lambda: has_trained(folder), process)
    shutil.rmtree(folder)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 2, output
    assert f"error: save_folder: {folder} or its lock .in_use was removed" in output
    assert "Traceback" not in output


class Uploads(Logger):
    """Records the length of the log at each upload."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.uploaded: list[tuple[str, int]] = []

    def upload_file(self, remote_file_name: str, file_path: Path | str, **_: Any) -> None:
        assert Path(file_path) == self.path
        self.uploaded.append((remote_file_name, len(self.path.read_text().splitlines())))


def test_the_log_is_uploaded_with_each_checkpoint_and_after_a_crash(tmp_path: Path) -> None:
    """Not with each epoch, which may be shorter or much longer."""
    log = tmp_path / "log.jsonl"
    log.touch()  # as left by an earlier process, so that none is downloaded
    saver, jsonl, logger = (
        CheckpointSaver(str(tmp_path)),
        JSONLLogger(str(log), "s3://bucket/run/log.jsonl"),
        Uploads(log),
    )
    state: Any = SimpleNamespace(callbacks=[jsonl, saver])
    jsonl.init(state, logger)
    for batch in range(6):
        jsonl.batch_start(state, logger)
        jsonl.log_metrics({"loss": 1.0}, step=batch)
        if batch in (1, 3):
            saver.saved_checkpoints.append(f"ep0-ba{batch + 1}-rank0.pt")
        jsonl.epoch_end(state, logger)
    assert logger.uploaded == [("run/log.jsonl", 2), ("run/log.jsonl", 4)]
    jsonl.close(state, logger)  # without fit_end, as after an error
    assert logger.uploaded[2:] == [("run/log.jsonl", 6)]
    jsonl.close(state, logger)
    assert len(logger.uploaded) == 3


@pytest.mark.parametrize("remote", ["s3://elsewhere/log.jsonl", "/tmp/log.jsonl", f"s3://{BUCKET}"])
def test_the_logs_own_address_must_be_in_save_folders_bucket(small_data: Path, remote: str) -> None:
    kept = small_run(Path("unused"), small_data, f"save_folder=s3://{BUCKET}/run")
    config = load_config([*kept, f"loggers.jsonl.remote=s3://{BUCKET}/logs/a.jsonl"])
    jsonl = next(each for each in build_loggers(config) if isinstance(each, JSONLLogger))
    assert (jsonl.path, jsonl.remote) == (Path("run/log.jsonl"), f"s3://{BUCKET}/logs/a.jsonl")
    with pytest.raises(InputError, match=r"^loggers\.jsonl\.remote: must be a file in save_folder's bucket"):
        load_config([*kept, f"loggers.jsonl.remote={remote}"])
    with pytest.raises(InputError, match=r"^loggers\.jsonl\.remote: must be null with save_folder unused, got"):
        load_config([*small_run(Path("unused"), small_data), f"loggers.jsonl.remote={remote}"])


def test_a_pointer_that_is_being_replaced_is_waited_for(uninterrupted: Path, tmp_path: Path) -> None:
    pointer = tmp_path / LATEST
    maker = threading.Timer(0.2, lambda: pointer.symlink_to(uninterrupted / "ep2-ba14-rank0.pt"))
    maker.start()
    student, teacher = load_any(pointer)
    maker.join()
    assert student is not None
    assert teacher is not None
    with pytest.raises(InputError, match=r"none\.pt: no such file"):
        load_any(tmp_path / "none.pt")


@pytest.mark.parametrize("step", ["fetch", "is_safetensors", "load_untrusted"])
def test_reads_the_next_checkpoint_if_one_is_removed_while_being_read(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """As a run does that keeps only the newest."""
    pointer, old, new = tmp_path / LATEST, tmp_path / "ep1-ba12-rank0.pt", tmp_path / "ep2-ba14-rank0.pt"
    shutil.copyfile(uninterrupted / old.name, old)
    pointer.symlink_to(old.name)
    function = getattr(load, step)

    def late(path: Path) -> Any:
        if path == old and old.exists():
            shutil.copyfile(uninterrupted / new.name, new)
            pointer.unlink()
            pointer.symlink_to(new.name)
            old.unlink()
        return function(path)

    monkeypatch.setattr(load, step, late)
    student, _ = load_any(pointer)
    assert student is not None
    expected = student_of(uninterrupted)
    assert all(
        torch.equal(tensor, expected[f"student.blocks.{name}"]) for name, tensor in student.blocks.state_dict().items()
    )

    new.write_bytes(new.read_bytes()[:999])
    with pytest.raises(InputError, match=rf"{new}: truncated"):
        load_any(pointer)


@pytest.mark.usefixtures("one_thread")
def test_runs_share_a_data_set_but_no_folder(
    uninterrupted: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the newest checkpoint of a running one can be read at any time."""
    monkeypatch.setattr("d2v_composer.callbacks.run_folder_lock.LOCK_WAIT_SECONDS", 0.1)
    shared = tmp_path / "shared"
    endless = ("max_duration=100000ba", "save_interval=3ba", "save_num_checkpoints_to_keep=5")
    process = start(train_command(small_run(shared, small_data, *endless)))
    wait_until(lambda: (shared / LATEST).exists(), process)

    train.main(small_run(tmp_path / "other", small_data))
    assert_same_student(tmp_path / "other", uninterrupted)

    with pytest.raises(InputError) as refused:
        train.main(small_run(shared, small_data, *endless))
    assert str(refused.value) == (
        f"save_folder: {shared} is in use by another run: choose another run_name or save_folder, "
        f"or stop process {process.pid} of {platform.node()}"
    )
    for _ in range(60):
        student, teacher = load_any(shared / LATEST)
        assert student is not None
        assert teacher is not None

    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    steps = [json.loads(line)["step"] for line in (shared / "log.jsonl").read_text().splitlines() if "loss/" in line]
    assert steps == list(range(len(steps)))  # written by one run
    assert len(checkpoints_of(shared)) == 5
