"""Data, teacher and checkpoints in an object store: a real S3 server on loopback."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from d2v_composer.benchmarks.object_store import ObjectStore
from d2v_composer.checkpoints.resume import download_checkpoint, find_newest_checkpoint
from d2v_composer.data.mds_index import fetch_index
from d2v_composer.system.addresses import RunFolder
from d2v_composer.system.errors import InputError
from helpers import (
    GOLDEN,
    assert_same_losses,
    encoded_image,
    losses_of,
    run_command,
    small_run,
    train_command,
    write_mds,
)

BUCKET = "cloud"


@pytest.fixture(scope="module")
def object_store(small_data: Path) -> Iterator[ObjectStore]:
    """Holds the small data set and a teacher."""
    with ObjectStore() as store:
        store.create_bucket(BUCKET)
        client = store.client()
        for file in small_data.iterdir():
            client.upload_file(str(file), BUCKET, f"images/{file.name}")
        client.upload_file(str(GOLDEN / "tiny_base.pt"), BUCKET, "teachers/tiny_base.pt")
        yield store


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_from_and_to_the_store(
    object_store: ObjectStore, uninterrupted: Path, tmp_path: Path, ranks: int
) -> None:
    name = f"run{ranks}"
    arguments = small_run(
        Path("unused"),
        tmp_path / "cache",
        f"save_folder=s3://{BUCKET}/runs/{name}",
        f"teacher.checkpoint=s3://{BUCKET}/teachers/tiny_base.pt",
        f"train_loader.remote=s3://{BUCKET}/images",
        "train_loader.num_workers=1",
        "report=true",
    )
    command = train_command(arguments, ranks)
    environment = object_store.environment | {"TORCH_HOME": str(tmp_path / "torch")}
    remote = run_command(*command, cwd=tmp_path, environment=environment, timeout=300)
    assert remote.returncode == 0, remote.stderr
    assert_same_losses(losses_of(tmp_path / "runs" / name), losses_of(uninterrupted), num_steps=14)

    stored = object_store.objects(BUCKET, f"runs/{name}/")
    pointer = "latest-rank0.pt.symlink"
    assert {"ep2-ba14-rank0.pt", pointer, "log.jsonl", "report.html", "report/loss.png", "run.yaml"} <= stored.keys()
    assert stored["log.jsonl"] == (tmp_path / "runs" / name / "log.jsonl").read_bytes()
    assert yaml.safe_load(stored["run.yaml"])["config"]["train_loader"]["remote"] == f"s3://{BUCKET}/images"

    # On another machine the same command finds the run in the store, and that it is finished.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    again = run_command(*command, cwd=elsewhere, environment=environment)
    assert again.returncode == 0, again.stderr
    assert (elsewhere / "runs" / name / "log.jsonl").read_bytes() == stored["log.jsonl"]


def test_the_newest_checkpoint_of_a_store(
    object_store: ObjectStore, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is fetched; none yet is no error, one that may not be read is; a store that is away is waited for."""
    remote, name = f"s3://{BUCKET}/runs/by_hand", "ep2-ba14-rank0.pt"
    for variable, value in object_store.environment.items():
        monkeypatch.setenv(variable, value)
    assert find_newest_checkpoint(RunFolder(tmp_path / "first", address=remote)) is None
    client = object_store.client()
    client.upload_file(str(uninterrupted / name), BUCKET, f"runs/by_hand/{name}")
    client.put_object(Bucket=BUCKET, Key="runs/by_hand/latest-rank0.pt.symlink", Body=f"runs/by_hand/{name}".encode())

    object_store.kill()
    starter = threading.Timer(3, object_store.start)
    starter.start()
    found = find_newest_checkpoint(RunFolder(tmp_path / "second", address=remote))
    starter.join()
    assert found is not None
    assert found == tmp_path / "second" / name
    assert found.read_bytes() == (uninterrupted / name).read_bytes()
    assert [path.name for path in found.parent.iterdir()] == [name]

    # What this machine has is older, or newer than what reached the store.
    shutil.copy(uninterrupted / "ep1-ba12-rank0.pt", tmp_path / "first")
    assert find_newest_checkpoint(RunFolder(tmp_path / "first", address=remote)) == tmp_path / "first" / name
    newer = Path(shutil.copy(found, tmp_path / "first" / "ep3-ba18-rank0.pt"))
    assert find_newest_checkpoint(RunFolder(tmp_path / "first", address=remote)) == newer

    download_checkpoint(f"{remote}/latest-rank0.pt", tmp_path / "given.pt")
    assert (tmp_path / "given.pt").read_bytes() == found.read_bytes()
    with pytest.raises(InputError, match=r"by_hand/ep9-ba9-rank0\.pt: no such file"):
        download_checkpoint(f"{remote}/ep9-ba9-rank0.pt", tmp_path / "given.pt")

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(InputError, match="so the newest checkpoint is unknown"):
        find_newest_checkpoint(RunFolder(tmp_path / "third", address=remote))


def test_a_damaged_newest_checkpoint_of_a_store_is_passed_over(
    object_store: ObjectStore,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for variable, value in object_store.environment.items():
        monkeypatch.setenv(variable, value)
    remote, client = f"s3://{BUCKET}/runs/damaged", object_store.client()
    before, newest, abandoned = "ep1-ba12-rank0.pt", "ep2-ba14-rank0.pt", "ep2-ba16-rank0.pt"
    whole = (uninterrupted / before).read_bytes()

    def put(name: str, contents: bytes) -> None:
        client.put_object(Bucket=BUCKET, Key=f"runs/damaged/{name}", Body=contents)

    for name, contents in {before: whole, newest: whole[:1000], abandoned: whole, f"report/{before}": b""}.items():
        put(name, contents)
    put("latest-rank0.pt.symlink", f"runs/damaged/{newest}".encode())

    assert find_newest_checkpoint(RunFolder(tmp_path / "new", address=remote)) == tmp_path / "new" / before
    assert (tmp_path / "new" / before).read_bytes() == whole
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert newest in caplog.text

    # What this machine has itself is as good as the store's, and is not fetched again.
    kept = tmp_path / "kept"
    kept.mkdir()
    shutil.copy(uninterrupted / before, kept)
    put(before, b"")
    assert find_newest_checkpoint(RunFolder(kept, address=remote)) == kept / before

    with pytest.raises(InputError, match=f"{remote}: none of its 2 checkpoints is complete: remove them to restart"):
        find_newest_checkpoint(RunFolder(tmp_path / "other", address=remote))


def test_a_cache_of_another_data_set_or_with_a_cut_index(
    object_store: ObjectStore, small_data: Path, tmp_path: Path
) -> None:
    remote, cache = f"s3://{BUCKET}/images", tmp_path / "cache"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in object_store.environment.items():
            patch.setenv(name, value)
        shutil.copytree(small_data, cache)
        fetch_index(remote, cache)
        assert (cache / "index.json").read_bytes() == (small_data / "index.json").read_bytes()

        (cache / "index.json").write_text("{cut")
        fetch_index(remote, cache)
        assert (cache / "index.json").read_bytes() == (small_data / "index.json").read_bytes()

        write_mds(tmp_path / "other", [encoded_image(5)])
        with pytest.raises(InputError, match="holds shards of another data set than"):
            fetch_index(remote, tmp_path / "other")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train_loader.remote=s3://nobody/images", "s3://nobody/images/index.json: cannot be fetched"),
        (f"train_loader.remote=s3://{BUCKET}/nothing", f"s3://{BUCKET}/nothing/index.json: cannot be fetched"),
        (f"teacher.checkpoint=s3://{BUCKET}/no.pt", f"s3://{BUCKET}/no.pt: cannot be fetched"),
    ],
)
def test_what_the_store_does_not_hold(object_store: ObjectStore, tmp_path: Path, override: str, message: str) -> None:
    arguments = small_run(tmp_path / "run", tmp_path / "cache", f"train_loader.remote=s3://{BUCKET}/images", override)
    environment = object_store.environment | {"TORCH_HOME": str(tmp_path / "torch")}
    result = run_command(*train_command(arguments), environment=environment)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
