"""Promises 6, 8, 10, 12 and 15 with data, teacher and checkpoints in an object store: a real S3 server on loopback."""

import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import yaml

from gated_store import WRITE_FAULTS, GatedStore
from helpers import (
    GOLDEN,
    assert_same_losses,
    assert_same_student,
    checkpoints_of,
    failure,
    has_trained,
    losses_of,
    run_command,
    run_training,
    small_run,
    start_python,
    started_ranks,
    traced,
    train_command,
    wait_until,
)

BUCKET = "training"
POINTER = "latest-rank0.pt.symlink"


@pytest.fixture(scope="module")
def store(object_store: GatedStore, small_data: Path) -> GatedStore:
    """The store with the small data set and a teacher."""
    object_store.create_bucket_of_images(BUCKET, small_data)
    object_store.client().upload_file(str(GOLDEN / "tiny_base.pt"), BUCKET, "teachers/tiny_base.pt")
    return object_store


def run_in_store(name: str, cache: Path, *overrides: str) -> list[str]:
    return small_run(
        Path("unused"),
        cache,
        f"save_folder=s3://{BUCKET}/runs/{name}",
        f"teacher.checkpoint=s3://{BUCKET}/teachers/tiny_base.pt",
        f"train_loader.remote=s3://{BUCKET}/images",
        "train_loader.num_workers=1",
        *overrides,
    )


@pytest.fixture
def variables(store: GatedStore, tmp_path: Path) -> dict[str, str]:
    """The variables with which runs reach the store."""
    return store.environment | {"TORCH_HOME": str(tmp_path / "torch")}


@pytest.mark.slow
def test_a_killed_run_resumes_on_another_machine(
    store: GatedStore, variables: dict[str, str], uninterrupted: Path, tmp_path: Path
) -> None:
    """6, 10, 15: from the store, which is down for a while; it ends with the same bits and keeps two checkpoints."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    arguments = run_in_store("killed", tmp_path / "cache", "save_interval=5ba", "report=true")
    kill = variables | {"AT": "batch_start 12 kill"}
    with started_ranks(*traced(arguments), ranks=1, environment=kill, folders=[here]) as [killed]:
        assert killed.wait(180) == -signal.SIGKILL, killed.stderr
    before = losses_of(here / "runs" / "killed")

    with started_ranks(*traced(arguments), ranks=1, environment=variables, folders=[there]) as [again]:
        folder = there / "runs" / "killed"
        wait_until(lambda: (folder / "latest-rank0.pt").exists(), seconds=120)
        with store.unreachable():
            time.sleep(5)  # Composer's own uploader fails after seconds
            assert again.poll() is None
        assert again.wait(180) == 0, again.stderr
    assert " at batch 5" in again.stdout or " at batch 10" in again.stdout or "resumed" not in again.stdout
    assert_same_student(folder, uninterrupted)
    assert_same_losses(before | losses_of(folder), losses_of(uninterrupted), num_steps=14)

    stored = store.objects(BUCKET, "runs/killed/")
    assert {POINTER, "log.jsonl", "report.html", "run.yaml"} <= stored.keys()
    assert {name for name in stored if name.endswith(".pt")} == {"ep1-ba10-rank0.pt", "ep2-ba14-rank0.pt"}
    assert stored[POINTER].decode().strip() == "runs/killed/ep2-ba14-rank0.pt"
    assert stored["log.jsonl"] == (folder / "log.jsonl").read_bytes()
    assert yaml.safe_load(stored["run.yaml"])["config"]["train_loader"]["remote"] == f"s3://{BUCKET}/images"

    # A third machine finds that the run has finished.
    third = tmp_path / "third"
    third.mkdir()
    ended = run_training(*arguments, cwd=third, environment=variables)
    assert (third / "runs" / "killed" / "log.jsonl").read_bytes() == stored["log.jsonl"]
    assert "export runs/killed/latest-rank0.pt" in ended.stdout
    assert (third / "runs" / "killed" / "latest-rank0.pt").is_file()


def test_a_store_that_denies_writing_ends_the_run_before_it_trains(
    store: GatedStore, small_data: Path, tmp_path: Path
) -> None:
    """11, 18: in seconds, not after the retries for a store that is unreachable."""
    arguments = small_run(Path("unused"), small_data, f"save_folder=s3://{BUCKET}/runs/denied")
    start = time.monotonic()
    ended = run_command(*train_command(arguments), cwd=tmp_path, environment=store.reader_environment)
    line = failure(ended, 1)
    assert line.startswith(f"error: s3://{BUCKET}/runs/denied/.in_use cannot be written (")
    assert "AccessDenied" in line
    assert time.monotonic() - start < 60
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("names", "override", "message"),
    [
        (["notes.txt"], "seed=17", "save_folder: {} holds files that are not ours, such as notes.txt; choose another"),
        (
            ["ep2-ba14-rank0.pt", POINTER],
            "autoresume=false",
            "autoresume: must be true, because {} holds a run's check",
        ),
    ],
)
def test_a_folder_in_a_store_that_holds_other_files_is_refused(
    names: list[str], override: str, message: str, store: GatedStore, small_data: Path, tmp_path: Path
) -> None:
    """7, 11."""
    prefix = f"runs/{override}"
    for name in names:
        store.client().put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=b"runs/x/ep2-ba14-rank0.pt")
    arguments = small_run(Path("unused"), small_data, f"save_folder=s3://{BUCKET}/{prefix}", override)
    ended = run_command(*train_command(arguments), cwd=tmp_path, environment=store.environment)
    assert message.format(f"s3://{BUCKET}/{prefix}") in failure(ended, 2)
    assert store.objects(BUCKET, f"{prefix}/").keys() == set(names)
    assert not (tmp_path / "runs").exists()


def test_a_refused_run_uploads_nothing_and_the_right_ones_work_next(
    store: GatedStore, small_data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """11: with the folder of a run that had no store so far, which goes on without, and then with one."""
    local, remote = Path("runs") / "moved", f"s3://{BUCKET}/runs/moved"
    shutil.copytree(uninterrupted, tmp_path / local, symlinks=True)
    refused = train_command(small_run(local, small_data, f"save_folder={remote}", "seed=18"))
    ended = run_command(*refused, cwd=tmp_path, environment=store.environment)
    assert "seed: checkpoint has 17, config has 18" in failure(ended, 2)
    assert store.objects(BUCKET, "runs/moved/") == {}
    assert "this run is complete" in run_training(*small_run(local, small_data), cwd=tmp_path).stdout
    run_training(
        *small_run(Path(remote), small_data, f"save_folder={remote}"), cwd=tmp_path, environment=store.environment
    )
    stored = store.objects(BUCKET, "runs/moved/")
    assert stored[POINTER].decode().strip() == "runs/moved/ep2-ba14-rank0.pt"
    assert {".in_use", "ep2-ba14-rank0.pt", "log.jsonl"} <= stored.keys()
    again = run_command(*train_command(small_run(local, small_data)), cwd=tmp_path)
    assert f"holds the files of {remote}, not of this run" in failure(again, 2)


def test_a_refused_run_leaves_no_copy_of_a_stores_checkpoint(
    store: GatedStore, small_data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """11: it would lie beside another run's, or become another run's."""
    prefix, name = "runs/copied", "ep2-ba14-rank0.pt"
    store.client().upload_file(str(uninterrupted / name), BUCKET, f"{prefix}/{name}")
    store.client().put_object(Bucket=BUCKET, Key=f"{prefix}/{POINTER}", Body=f"{prefix}/{name}".encode())
    arguments = small_run(Path("unused"), small_data, f"save_folder=s3://{BUCKET}/{prefix}", "seed=18")
    ended = run_command(*train_command(arguments), cwd=tmp_path, environment=store.environment)
    assert "seed: checkpoint has 17, config has 18" in failure(ended, 2)
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_of_a_store_comes_with_its_log(
    store: GatedStore, variables: dict[str, str], uninterrupted: Path, small_data: Path, tmp_path: Path
) -> None:
    """23: not with this machine's, which is longer, but was left behind."""
    before, newest, put = "ep1-ba12-rank0.pt", "ep2-ba14-rank0.pt", partial(store.client().put_object, Bucket=BUCKET)
    for name in (before, newest):
        put(Key=f"runs/logged/{name}", Body=(uninterrupted / name).read_bytes())
    put(Key=f"runs/logged/{POINTER}", Body=f"runs/logged/{newest}".encode())
    put(Key="runs/logged/log.jsonl", Body=b'{"step": 13, "loss/train/total": 1.0}\n')
    folder = tmp_path / "runs" / "logged"
    folder.mkdir(parents=True)
    shutil.copy(uninterrupted / before, folder)
    (folder / "latest-rank0.pt").symlink_to(before)
    (folder / ".in_use").write_text(f"s3://{BUCKET}/runs/logged\n")
    shutil.copy(uninterrupted / "log.jsonl", folder)
    arguments = small_run(Path("unused"), small_data, f"save_folder=s3://{BUCKET}/runs/logged")
    run_training(*arguments, cwd=tmp_path, environment=variables)
    assert losses_of(folder) == {13: 1.0}


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_of_a_store_is_skipped(
    store: GatedStore, variables: dict[str, str], uninterrupted: Path, small_data: Path, tmp_path: Path
) -> None:
    """12: with a warning; where none is whole, or reading is denied, the run does not start over in silence."""
    before, newest = "ep1-ba12-rank0.pt", "ep2-ba14-rank0.pt"
    whole = (uninterrupted / before).read_bytes()
    put = partial(store.client().put_object, Bucket=BUCKET)
    for name, content in {before: whole, newest: whole[:1000]}.items():
        put(Key=f"runs/damaged/{name}", Body=content)
    put(Key=f"runs/damaged/{POINTER}", Body=f"runs/damaged/{newest}".encode())
    arguments = small_run(Path("unused"), small_data, f"save_folder=s3://{BUCKET}/runs/damaged")
    denied = run_command(
        *train_command(arguments), cwd=tmp_path, environment=variables | {"AWS_SECRET_ACCESS_KEY": "wrong"}
    )
    assert f"s3://{BUCKET}/runs/damaged" in failure(denied, denied.returncode)
    assert denied.returncode in (1, 2)

    with started_ranks(*traced(arguments), ranks=1, environment=variables, folders=[tmp_path]) as [program]:
        assert program.wait(180) == 0, program.stderr
    assert newest in program.stderr
    assert " at batch 12" in program.stdout
    assert_same_student(tmp_path / "runs" / "damaged", uninterrupted)

    for name in (before, newest):
        put(Key=f"runs/hopeless/{name}", Body=whole[:1000])
    put(Key=f"runs/hopeless/{POINTER}", Body=f"runs/hopeless/{newest}".encode())
    arguments = small_run(Path("unused"), small_data, f"save_folder=s3://{BUCKET}/runs/hopeless")
    hopeless = run_command(*train_command(arguments), cwd=tmp_path, environment=variables)
    assert "runs/hopeless" in failure(hopeless, hopeless.returncode)


@pytest.mark.slow
@pytest.mark.parametrize("fault", WRITE_FAULTS)
def test_a_store_that_fails_during_a_save_and_is_back(
    fault: str,
    store: GatedStore,
    variables: dict[str, str],
    uninterrupted: Path,
    small_data: Path,
    tmp_path: Path,
) -> None:
    """6, 10: the run trains on meanwhile, and all that is stored in the end is whole."""
    faults = [[fault] * 7 for _ in range(3)]  # more than boto3's own attempts
    files = ("ep1-ba10-rank0.pt", POINTER, "ep2-ba14-rank0.pt")
    store.faults |= {f"PUT {BUCKET}/runs/{fault}/{file}": left for file, left in zip(files, faults, strict=True)}
    options = (f"save_folder=s3://{BUCKET}/runs/{fault}", "save_num_checkpoints_to_keep=-1")
    run_training(*small_run(Path("unused"), small_data, *options), cwd=tmp_path, environment=variables)
    assert all(len(left) < 7 for left in faults)
    folder = tmp_path / "runs" / fault
    assert_same_student(folder, uninterrupted)
    stored = store.objects(BUCKET, f"runs/{fault}/")
    assert stored[POINTER].decode().strip() == f"runs/{fault}/ep2-ba14-rank0.pt"
    names = checkpoints_of(folder)
    assert {name for name in stored if name.endswith(".pt")} == names
    assert all(stored[name] == (folder / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("fault", "is_awaited"),
    [
        pytest.param("half", False, marks=pytest.mark.slow),
        pytest.param("quota", True, marks=pytest.mark.campaign),  # ten minutes
    ],
)
def test_a_store_that_fails_during_a_save_and_stays_away(
    fault: str,
    is_awaited: bool,
    store: GatedStore,
    variables: dict[str, str],
    uninterrupted: Path,
    small_data: Path,
    tmp_path: Path,
) -> None:
    """6, 10, 18: what was stored before is whole, and another machine goes on from it, without or after an error."""
    address = f"s3://{BUCKET}/runs/away-{fault}"
    arguments = small_run(Path("unused"), small_data, f"save_folder={address}", "save_num_checkpoints_to_keep=-1")
    before, newest = "ep1-ba8-rank0.pt", "ep1-ba10-rank0.pt"
    faults = store.faults[f"PUT {BUCKET}/runs/away-{fault}/{newest}"] = [fault] * 10_000
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    program = start_python(*train_command(arguments)[1:], cwd=here, environment=variables)
    wait_until(lambda: len(faults) < 10_000, seconds=120)
    wait_until(lambda: 13 in losses_of(here / "runs" / f"away-{fault}"), seconds=120)
    if is_awaited:
        assert program.wait(timeout=900) == 1
        assert failure(program, 1).startswith(f"error: {address}/{newest} cannot be written (")
    program.kill()
    program.wait(timeout=30)
    faults.clear()
    stored = store.objects(BUCKET, f"runs/away-{fault}/")
    assert before in stored
    assert newest not in stored
    assert stored[POINTER].decode().strip().endswith(before)
    ended = run_training(*arguments, cwd=there, environment=variables)
    assert " at batch 8" in ended.stdout
    assert_same_student(there / "runs" / f"away-{fault}", uninterrupted)


@pytest.mark.slow
def test_sigterm_to_all_processes_still_uploads_the_checkpoint(
    store: GatedStore, variables: dict[str, str], uninterrupted: Path, small_data: Path, tmp_path: Path
) -> None:
    """10, 11: data workers and uploaders receive the signal as well, and another machine resumes."""
    overrides = (f"save_folder=s3://{BUCKET}/runs/everyone", "save_interval=1000ba", "train_loader.num_workers=1")
    arguments, folder = small_run(Path("unused"), small_data, *overrides), tmp_path / "runs" / "everyone"
    program = start_python(*train_command(arguments)[1:], cwd=tmp_path, environment=variables)
    wait_until(lambda: has_trained(folder), seconds=90)
    os.killpg(program.pid, signal.SIGTERM)
    assert program.wait(timeout=90) == 143, program.stderr
    [name] = checkpoints_of(folder)
    stored = store.objects(BUCKET, "runs/everyone/")
    assert stored[POINTER].decode().strip() == f"runs/everyone/{name}"
    assert stored[name] == (folder / name).read_bytes()
    shutil.rmtree(folder)  # as on another machine
    run_training(*arguments, cwd=tmp_path, environment=variables, timeout=300)
    assert_same_student(folder, uninterrupted)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train_loader.remote=s3://nobody/images", "s3://nobody/images/index.json"),
        (f"train_loader.remote=s3://{BUCKET}/nothing", f"s3://{BUCKET}/nothing/index.json"),
        (f"teacher.checkpoint=s3://{BUCKET}/no.pt", f"s3://{BUCKET}/no.pt"),
        pytest.param(f"load_path=s3://{BUCKET}/no.pt", f"s3://{BUCKET}/no.pt", marks=pytest.mark.slow),
    ],
)
def test_a_missing_object_is_one_line(variables: dict[str, str], tmp_path: Path, override: str, message: str) -> None:
    """18."""
    arguments = small_run(tmp_path / "run", tmp_path / "cache", f"train_loader.remote=s3://{BUCKET}/images", override)
    ended = run_command(*train_command(arguments), environment=variables)
    assert message in failure(ended, 2)
    assert not checkpoints_of(tmp_path / "run")
