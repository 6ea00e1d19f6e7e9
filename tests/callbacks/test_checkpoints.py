"""Checkpoints: what is kept locally and in S3, uploads, and one run a folder at a time."""

import logging
from functools import partial
from pathlib import Path

import pytest

from d2v_composer.callbacks.checkpointing import Checkpoints
from d2v_composer.callbacks.logging import Uploads
from d2v_composer.checkpoints.checkpoint import LATEST
from d2v_composer.checkpoints.saving import outdated, prune_store
from d2v_composer.system.addresses import RunFolder
from d2v_composer.system.errors import InputError, RunError
from gated_store import GatedStore

BUCKET = "saved"


@pytest.fixture(scope="session")
def store(object_store: GatedStore) -> GatedStore:
    object_store.create_bucket(BUCKET)
    return object_store


def names_of(*batches: int) -> list[str]:
    return [f"ep0-ba{batch}-rank0.pt" for batch in batches]


def test_only_checkpoints_before_the_pointers_are_outdated() -> None:
    other_files = ["log.jsonl", LATEST, "student.pt", "ep0-ba5-rank1.pt", "checkpoint.partial"]
    assert outdated(names_of(5, 100, 10, 20) + other_files, names_of(100)[0], 2) == names_of(10, 5)
    assert outdated(names_of(5, 10), names_of(10)[0], 2) == []
    assert outdated(names_of(5, 10), names_of(10)[0], -1) == []
    # A newer one than the pointer's is of the run before a restart: it is kept, and does not count.
    assert outdated(names_of(5, 10, 20, 100), names_of(10)[0], 1) == names_of(5)


@pytest.mark.usefixtures("short_pauses")
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
    assert caplog.messages[0].startswith(f"s3://{BUCKET}/runs/a: could not remove old checkpoints (")
    assert len(store.objects(BUCKET, "runs/a")) == 9

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", store.environment["AWS_ACCESS_KEY_ID"])
    prune_store(f"s3://{BUCKET}/runs/a", names_of(10)[0], 1)
    assert set(store.objects(BUCKET, "runs/a/")) == {*names_of(10, 20), *(f"b/{name}" for name in names_of(5, 10, 20))}
    assert len(store.objects(BUCKET, "runs/ab/")) == 3
    prune_store(f"s3://{BUCKET}", names_of(20)[0], 2)
    assert {name for name in store.objects(BUCKET) if "/" not in name} == set(names_of(10, 20))


def test_a_failed_upload_ends_the_run_and_gives_up_the_others(caplog: pytest.LogCaptureFixture) -> None:
    uploads, done = Uploads("s3://bucket/run"), []

    def fail() -> None:
        raise RunError("s3://bucket/run cannot be written")

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
    assert caplog.messages == ["s3://bucket/run cannot be written"]


def test_a_folder_is_of_one_address(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "s3://a/runs")
    for _ in range(2):
        Checkpoints(folder, "5ba").post_close()
        assert list(tmp_path.iterdir()) == []
    checkpoints = Checkpoints(folder, "5ba")
    (tmp_path / "log.jsonl").touch()
    checkpoints.post_close()
    with pytest.raises(InputError, match=r"holds the files of s3://a/runs, not of s3://b/runs"):
        Checkpoints(RunFolder(tmp_path, "s3://b/runs"), "5ba")
