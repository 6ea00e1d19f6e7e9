"""Data, teacher and checkpoints in an object store: a real S3 server on loopback."""

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import yaml

from d2v_composer.checkpoints.resume import complete_store, download_checkpoint, find_newest_checkpoint
from d2v_composer.data.index import fetch_index
from d2v_composer.system.addresses import RunFolder
from d2v_composer.system.errors import InputError
from gated_store import GatedStore
from helpers import (
    FORKED_UPLOADS,
    GOLDEN,
    assert_same_losses,
    encoded_image,
    losses_of,
    run_command,
    small_run,
    train_command,
    wait_until,
    write_mds,
)

BUCKET = "training"


@pytest.fixture(scope="session")
def store(object_store: GatedStore, small_data: Path) -> GatedStore:
    """The store with the small data set and a teacher."""
    object_store.create_bucket_of_images(BUCKET, small_data)
    object_store.client().upload_file(str(GOLDEN / "tiny_base.pt"), BUCKET, "teachers/tiny_base.pt")
    return object_store


@pytest.fixture
def environment(store: GatedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The variables with which this process and its runs reach the store; this process retries after short pauses."""
    monkeypatch.setattr("d2v_composer.system.retry.FIRST_PAUSE", 0.05)
    variables = store.environment | {"TORCH_HOME": str(tmp_path / "torch")}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_trains_from_and_to_a_store(
    store: GatedStore, environment: dict[str, str], uninterrupted: Path, tmp_path: Path, ranks: int
) -> None:
    name = f"run{ranks}"
    arguments = small_run(
        Path("unused"),
        tmp_path / "cache",
        f"save_folder=s3://{BUCKET}/runs/{name}",
        f"teacher.checkpoint=s3://{BUCKET}/teachers/tiny_base.pt",
        f"train_loader.remote=s3://{BUCKET}/images",
        "train_loader.num_workers=1",
        "save_interval=7ba",  # each upload takes seconds
        "report=true",
    )
    command = train_command(arguments, ranks) if ranks == 2 else [sys.executable, FORKED_UPLOADS, *arguments]
    remote = run_command(*command, cwd=tmp_path, environment=environment, timeout=300)
    assert remote.returncode == 0, remote.stderr
    assert_same_losses(losses_of(tmp_path / "runs" / name), losses_of(uninterrupted), num_steps=14)

    stored = store.objects(BUCKET, f"runs/{name}/")
    pointer = "latest-rank0.pt.symlink"
    assert {"ep2-ba14-rank0.pt", pointer, "log.jsonl", "report.html", "report/loss.png", "run.yaml"} <= stored.keys()
    assert stored["log.jsonl"] == (tmp_path / "runs" / name / "log.jsonl").read_bytes()
    assert yaml.safe_load(stored["run.yaml"])["config"]["train_loader"]["remote"] == f"s3://{BUCKET}/images"

    # On another machine, the same command finds in the store that the run has finished.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    again = run_command(*command, cwd=elsewhere, environment=environment)
    assert again.returncode == 0, again.stderr
    assert (elsewhere / "runs" / name / "log.jsonl").read_bytes() == stored["log.jsonl"]


@pytest.mark.usefixtures("environment")
def test_fetches_the_newest_checkpoint_of_a_store(
    store: GatedStore,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An unreachable store is retried. That there is no checkpoint yet is no error, that access is denied is one."""
    remote, name = f"s3://{BUCKET}/runs/by_hand", "ep2-ba14-rank0.pt"
    assert find_newest_checkpoint(RunFolder(tmp_path / "first", address=remote)) is None
    client = store.client()
    client.upload_file(str(uninterrupted / name), BUCKET, f"runs/by_hand/{name}")
    client.put_object(Bucket=BUCKET, Key="runs/by_hand/latest-rank0.pt.symlink", Body=f"runs/by_hand/{name}".encode())

    with ThreadPoolExecutor() as pool:
        with store.unreachable():
            finding = pool.submit(find_newest_checkpoint, RunFolder(tmp_path / "second", address=remote))
            wait_until(lambda: "retrying" in caplog.text)
        found = finding.result()
    assert found is not None
    assert found == tmp_path / "second" / name
    assert found.read_bytes() == (uninterrupted / name).read_bytes()
    assert [path.name for path in found.parent.iterdir()] == [name]

    # This machine's own checkpoint is older, or newer than the one in the store.
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


@pytest.mark.usefixtures("environment")
def test_a_restart_completes_the_upload_that_a_kill_cut_off(
    store: GatedStore, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above all after the last batch, when nothing else would upload it."""
    folder = RunFolder(uninterrupted, address=f"s3://{BUCKET}/runs/cut_off")
    newest, pointer = uninterrupted / "ep2-ba14-rank0.pt", "latest-rank0.pt.symlink"
    key = f"runs/cut_off/{newest.name}"
    put = partial(store.client().put_object, Bucket=BUCKET)
    put(Key=f"runs/cut_off/{pointer}", Body=b"runs/cut_off/ep1-ba12-rank0.pt")
    complete_store(newest, folder, always=False)
    expected = {newest.name: newest.read_bytes(), pointer: key.encode()}
    assert store.objects(BUCKET, "runs/cut_off/") == expected

    put(Key=key, Body=b"another machine's")
    complete_store(newest, folder, always=False)  # the pointer names it: it was uploaded
    assert store.objects(BUCKET, "runs/cut_off/") == expected | {newest.name: b"another machine's"}
    complete_store(newest, folder, always=True)
    assert store.objects(BUCKET, "runs/cut_off/") == expected
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(InputError, match="so the newest checkpoint is unknown"):
        complete_store(newest, folder, always=True)


@pytest.mark.usefixtures("environment")
def test_skips_a_truncated_newest_checkpoint_of_a_store(
    store: GatedStore, uninterrupted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remote, client = f"s3://{BUCKET}/runs/damaged", store.client()
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

    # A complete checkpoint of this machine is not fetched again.
    kept = tmp_path / "kept"
    kept.mkdir()
    shutil.copy(uninterrupted / before, kept)
    put(before, b"")
    assert find_newest_checkpoint(RunFolder(kept, address=remote)) == kept / before

    with pytest.raises(InputError, match=f"{remote}: none of its 2 checkpoints is complete: remove them to restart"):
        find_newest_checkpoint(RunFolder(tmp_path / "other", address=remote))


@pytest.mark.usefixtures("environment")
def test_repairs_a_truncated_index_and_refuses_the_cache_of_another_data_set(small_data: Path, tmp_path: Path) -> None:
    remote, cache = f"s3://{BUCKET}/images", shutil.copytree(small_data, tmp_path / "cache")
    fetch_index(remote, cache)
    assert (cache / "index.json").read_bytes() == (small_data / "index.json").read_bytes()

    (cache / "index.json").write_text("{truncated")
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
def test_a_missing_object_ends_the_command_with_one_line(
    environment: dict[str, str], tmp_path: Path, override: str, message: str
) -> None:
    arguments = small_run(tmp_path / "run", tmp_path / "cache", f"train_loader.remote=s3://{BUCKET}/images", override)
    result = run_command(*train_command(arguments), environment=environment)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
