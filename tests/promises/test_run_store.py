"""Promises 6, 8, 10, 12 and 15 with data, teacher and checkpoints in an object store: a real S3 server on loopback."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from small_runs import Run

from gated_store import WRITE_FAULTS, GatedStore
from helpers import (
    GOLDEN,
    assert_same_losses,
    assert_same_student,
    checkpoints_of,
    failure,
    losses_of,
    run_command,
    slow,
    small_run,
    train_command,
    wait_until,
)

BUCKET = "training"
IMAGES, TEACHER = f"train_loader.remote=s3://{BUCKET}/images", f"teacher.checkpoint=s3://{BUCKET}/tiny_base.pt"
POINTER = "latest-rank0.pt.symlink"
KEEP_ALL = "save_num_checkpoints_to_keep=-1"
# Those that an uninterrupted run leaves.
BEFORE, NEWEST = "ep1-ba12-rank0.pt", "ep2-ba14-rank0.pt"


@pytest.fixture(scope="module")
def store(object_store: GatedStore, small_data: Path) -> GatedStore:
    """The store with the small data set and a teacher."""
    object_store.create_bucket_of_images(BUCKET, small_data)
    object_store.client().upload_file(str(GOLDEN / "tiny_base.pt"), BUCKET, "tiny_base.pt")
    return object_store


class StoredRun(Run):
    """A run whose folder is in the store; ``cwd`` is its machine."""

    def __init__(self, store: GatedStore, name: str, data: Path, *overrides: str, cwd: Path) -> None:
        cwd.mkdir(exist_ok=True)
        self.store, self.prefix, self.address = store, f"runs/{name}/", f"s3://{BUCKET}/runs/{name}"
        environment = store.environment | {"TORCH_HOME": str(cwd / "torch")}
        settings = f"save_folder={self.address}", *overrides
        super().__init__(cwd / "runs" / name, data, *settings, cwd=cwd, environment=environment)

    def files(self) -> dict[str, bytes]:
        """Return what the store has of it, by name."""
        return self.store.objects(BUCKET, self.prefix)

    def newest_in_store(self) -> str:
        return self.files()[POINTER].decode().strip().removeprefix(self.prefix)

    def put(self, name: str, content: bytes) -> None:
        self.store.client().put_object(Bucket=BUCKET, Key=self.prefix + name, Body=content)

    def put_checkpoints(self, newest: str, **contents: bytes) -> None:
        """Put checkpoints there, by name, and the pointer to the newest one."""
        for name, content in {**contents, POINTER: f"{self.prefix}{newest}".encode()}.items():
            self.put(name, content)


InStore = Callable[..., StoredRun]


@pytest.fixture
def in_store(store: GatedStore, small_data: Path, tmp_path: Path) -> InStore:
    """Return what makes a run in the store, given its name."""

    def make(name: str, *overrides: str, cwd: Path = tmp_path) -> StoredRun:
        return StoredRun(store, name, small_data, *overrides, cwd=cwd)

    return make


@pytest.mark.slow
def test_a_killed_run_resumes_on_another_machine(
    store: GatedStore, in_store: InStore, uninterrupted: Path, tmp_path: Path
) -> None:
    """Promises 6, 10 and 15: the store is down for a while; the run ends with the same bits, and keeps two
    checkpoints there.
    """
    cache = f"train_loader.local={tmp_path / 'cache'}"
    options = IMAGES, TEACHER, cache, "train_loader.num_workers=1", "save_interval=5ba", "report=true"
    here, there, third = (in_store("killed", *options, cwd=tmp_path / name) for name in ("here", "there", "third"))
    here.train_until_killed("batch_start 12")
    again = there.start()
    wait_until(there.newest.exists, seconds=120)
    with store.unreachable():
        time.sleep(5)  # Composer's own uploader fails after seconds
        assert again.poll() is None
    assert again.wait(180) == 0, again.stderr
    assert " at batch 5" in again.stdout or " at batch 10" in again.stdout or "resumed" not in again.stdout
    assert_same_student(there.folder, uninterrupted)
    assert_same_losses(here.losses | there.losses, losses_of(uninterrupted), num_steps=14)

    stored = there.files()
    assert {POINTER, "log.jsonl", "report.html", "run.yaml"} <= stored.keys()
    assert {name for name in stored if name.endswith(".pt")} == {"ep1-ba10-rank0.pt", NEWEST}
    assert there.newest_in_store() == NEWEST
    assert stored["log.jsonl"] == (there.folder / "log.jsonl").read_bytes()
    assert yaml.safe_load(stored["run.yaml"])["config"]["train_loader"]["remote"] == f"s3://{BUCKET}/images"

    assert "export runs/killed/latest-rank0.pt" in third.train().stdout  # it finds that the run has finished
    assert (third.folder / "log.jsonl").read_bytes() == stored["log.jsonl"]
    assert third.newest.is_file()


def test_a_store_that_denies_writing_ends_the_run_before_it_trains(store: GatedStore, in_store: InStore) -> None:
    """Promises 11 and 18: it ends in seconds, without the retries for a store that is unreachable."""
    run, start = in_store("denied"), time.monotonic()
    run.options["environment"] = store.reader_environment
    line = run.refused(status=1)
    assert line.startswith(f"error: {run.address}/.in_use cannot be written (")
    assert "AccessDenied" in line
    assert time.monotonic() - start < 60
    assert not run.folder.exists()


@pytest.mark.parametrize(
    ("names", "override", "key"),
    [(["notes.txt"], "seed=17", "save_folder"), ([NEWEST, POINTER], "autoresume=false", "autoresume")],
)
def test_a_folder_in_a_store_that_holds_other_files_is_refused(
    names: list[str], override: str, key: str, in_store: InStore
) -> None:
    """Promises 7 and 11: what is there stays, and nothing is added, here or there."""
    run = in_store(override)
    for name in names:
        run.put(name, f"runs/x/{NEWEST}".encode())
    line = run.refused(override)
    assert key in line
    assert run.address in line
    assert run.files().keys() == set(names)
    assert not run.folder.exists()


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_of_a_store_is_skipped(in_store: InStore, uninterrupted: Path) -> None:
    """Promise 12: a warning names it; where none is whole, or reading is denied, the run does not start over
    in silence.
    """
    run, hopeless, whole = in_store("damaged"), in_store("hopeless"), (uninterrupted / BEFORE).read_bytes()
    run.put_checkpoints(NEWEST, **{BEFORE: whole, NEWEST: whole[:1000]})
    denied = run.start(AWS_SECRET_ACCESS_KEY="wrong")
    assert denied.wait(180) in (1, 2)
    assert run.address in failure(denied, denied.wait(1))

    ended = run.train()
    assert NEWEST in ended.stderr
    assert " at batch 12" in ended.stdout
    assert_same_student(run.folder, uninterrupted)

    hopeless.put_checkpoints(NEWEST, **dict.fromkeys((BEFORE, NEWEST), whole[:1000]))
    ended = hopeless.start()
    assert "runs/hopeless" in failure(ended, ended.wait(180) or 1)


@pytest.mark.slow
@pytest.mark.parametrize("fault", WRITE_FAULTS)
def test_a_store_that_fails_during_a_save_and_is_back(
    fault: str, store: GatedStore, in_store: InStore, uninterrupted: Path
) -> None:
    """Promises 6 and 10: the run trains on meanwhile, and all that is stored in the end is whole."""
    run = in_store(fault, KEEP_ALL)
    faults = {f"PUT {BUCKET}/runs/{fault}/{name}": [fault] * 7 for name in ("ep1-ba10-rank0.pt", POINTER, NEWEST)}
    store.faults |= faults  # seven: more than boto3's own attempts
    run.train()
    assert all(len(left) < 7 for left in faults.values())
    assert_same_student(run.folder, uninterrupted)
    stored, names = run.files(), checkpoints_of(run.folder)
    assert run.newest_in_store() == NEWEST
    assert {name for name in stored if name.endswith(".pt")} == names
    assert all(stored[name] == (run.folder / name).read_bytes() for name in names)


@pytest.mark.slow
def test_a_store_that_fails_during_a_save_and_stays_away(
    store: GatedStore, in_store: InStore, uninterrupted: Path, tmp_path: Path
) -> None:
    """What was stored before is whole, and another machine goes on from it."""
    before, newest = "ep1-ba8-rank0.pt", "ep1-ba10-rank0.pt"
    here, there = (in_store("away", KEEP_ALL, cwd=tmp_path / machine) for machine in ("here", "there"))
    faults = store.faults[f"PUT {BUCKET}/runs/away/{newest}"] = ["half"] * 10_000
    program = here.start()
    wait_until(lambda: len(faults) < 10_000, seconds=120)
    wait_until(lambda: 13 in here.losses, seconds=120)
    program.kill()
    program.wait(timeout=30)
    faults.clear()
    assert before in here.files()
    assert newest not in here.files()
    assert here.newest_in_store() == before
    assert " at batch 8" in there.train().stdout
    assert_same_student(there.folder, uninterrupted)


@pytest.mark.parametrize(
    ("override", "change", "said"),
    [
        ("train_loader.remote=s3://nobody/images", {}, "s3://nobody/images/index.json"),
        (f"train_loader.remote=s3://{BUCKET}/nothing", {}, f"s3://{BUCKET}/nothing/index.json"),
        (f"teacher.checkpoint=s3://{BUCKET}/no.pt", {}, "no.pt"),
        slow(f"load_path=s3://{BUCKET}/no.pt", {}, "no.pt"),
        (IMAGES, {"AWS_SECRET_ACCESS_KEY": "wrong"}, "SignatureDoesNotMatch"),
        (IMAGES, {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "credentials"),
        (IMAGES, {"S3_ENDPOINT_URL": "http://127.0.0.1:9"}, "Could not connect to the endpoint URL"),
    ],
)
def test_what_a_store_does_not_give_is_one_line(
    store: GatedStore, tmp_path: Path, override: str, change: dict[str, str], said: str
) -> None:
    """Promises 6 and 18: a file is missing, or access is denied."""
    environment = store.environment | {"TORCH_HOME": str(tmp_path / "torch")} | change
    arguments = small_run(tmp_path / "run", tmp_path / "cache", IMAGES, override, "train_loader.timeout=2")
    ended = run_command(*train_command(arguments), environment=environment)
    assert ended.returncode == 2 or (change and ended.returncode == 1)
    line = failure(ended, ended.returncode)
    assert override.partition("=")[2] in line
    assert said in line
    assert not checkpoints_of(tmp_path / "run")
