"""The preflight finds and names what would end a run, and leaves nothing behind."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from composer.utils import dist

from d2v_composer.config.load import load_config
from d2v_composer.runs.preflight import Rehearsal
from d2v_composer.system.errors import InputError, RunError
from gated_store import GatedStore
from helpers import ROOT, datasets_of, run_command, run_training, slow, small_run, wait_until
from recipes import preflight

PREFLIGHT = ROOT / "recipes" / "preflight.py"
BUCKET = "preflight"


def small_preflight(folder: Path | str, data: Path, labeled: Path, *overrides: str) -> list[str]:
    """Arguments of a tiny run with retrieval, health and a worker."""
    sets = f"retrieval.{datasets_of(labeled)}"
    return small_run(data, data, sets, f"save_folder={folder}", "train_loader.num_workers=1", *overrides)


def rehearsal(*arguments: str) -> Rehearsal:
    return Rehearsal(arguments, load_config(arguments), PREFLIGHT.with_name("train.py"))


def test_the_needs_of_the_whole_run(tmp_path: Path, small_data: Path, labeled: Path) -> None:
    """By hand: 30,000 batches of 256 at 1,280 images/s are 6,000 s; 6 retrievals of 16 s are 96 s."""
    run = rehearsal(
        *small_preflight(tmp_path, small_data, labeled),
        "max_duration=30000ba",
        "global_train_batch_size=256",
        "retrieval.interval=1ep",
    )
    run.ranks, run.data = 8, {"modality": "image", "samples": 5000 * 256 + 255}
    measured = {"throughput/samples_per_sec": 1280, "throughput/data_wait": 0.2, "time/zero_shot_retrieval": 16}
    run.logged = {key: {0: 1.0, 9: float(value)} for key, value in measured.items()}
    text = run.needs()
    assert "1,280 images/s on 8 rank(s), 20% of the time" in text
    assert "1.7 h (13.5 rank-hours) for 30,000 batches, including 0.0 h for retrievals (6)" in text


def test_the_pace_on_a_gpu_is_that_of_a_hundred_batches(
    tmp_path: Path, small_data: Path, labeled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that of the batches loaded ahead while the first step compiled. One of ten intervals waits for its images."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    store = "train_loader.remote=s3://bucket/images"
    run = rehearsal(*small_preflight(tmp_path, small_data, labeled), "train_loader.num_workers=10", store)
    run.data = {"modality": "image", "samples": 96}
    assert run.batches == 10 + 100 + 10 * 2
    paces, waits = [9e9, 9e9, *[2000.0] * 9, 200.0], [0.0] * 11 + [0.9]
    run.logged = {
        "throughput/samples_per_sec": {10 * i: pace for i, pace in enumerate(paces)},
        "throughput/data_wait": {10 * i: wait for i, wait in enumerate(waits)},
    }
    needs = run.needs()
    assert "pace          1,053 images/s on 1 rank(s), 47% of the time waiting for data\n" in needs
    assert needs.endswith("\nnodes         any number that divides num_canonical_nodes, 1")


def test_a_run_that_ignores_sigterm_is_named(
    tmp_path: Path, small_data: Path, labeled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = rehearsal(*small_preflight(tmp_path, small_data, labeled))
    run.output.write_text("still training\n")
    monkeypatch.setattr(run, "wait", lambda seconds: None)
    with pytest.raises(RunError, match="the run did not exit with status 143 within 120 s of SIGTERM: see the lines"):
        run.stop()


@pytest.fixture(scope="session")
def store(object_store: GatedStore, small_data: Path) -> GatedStore:
    """The store with the small data set."""
    object_store.create_bucket_of_images(BUCKET, small_data)
    return object_store


def remote_preflight(tmp_path: Path, labeled: Path) -> list[str]:
    """Arguments of a tiny run that reads from the store and saves to it."""
    remote = f"train_loader.remote=s3://{BUCKET}/images"
    return small_preflight(f"s3://{BUCKET}/runs/small", tmp_path / "cache", labeled, remote)


@pytest.mark.usefixtures("reachable_store")
def test_faults_of_a_store_are_named(
    store: GatedStore, small_data: Path, tmp_path: Path, labeled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = rehearsal(*remote_preflight(tmp_path, labeled))
    assert run.check_shards() == f"s3://{BUCKET}/images has 4 of 4 shards"
    store.client().put_object(Bucket=BUCKET, Key="runs/small/.d2v-preflight/log.jsonl", Body=b"")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", store.reader_environment["AWS_ACCESS_KEY_ID"])
        with pytest.raises(Exception, match="DeleteObject"):
            run.remove()
    run.remove()
    assert not store.objects(BUCKET, "runs/")
    shard = sorted(small_data.glob("*.mds"))[1].name
    message = f"1 of 4 shards missing; the first is {shard}"
    with store.replaced(BUCKET, f"images/{shard}", None), pytest.raises(InputError, match=message):
        run.check_shards()


@pytest.mark.slow
@pytest.mark.parametrize(
    "student", [[], ["student.depth=5", "student.model=timm/test_byobnet"]], ids=["blocks", "timm"]
)
def test_a_good_run_passes_and_nothing_is_left(
    store: GatedStore, tmp_path: Path, labeled: Path, student: list[str]
) -> None:
    """It resumes from a store."""
    arguments = [*remote_preflight(tmp_path, labeled), *student, "retrieval.representation=output"]
    before, command = store.objects(BUCKET).keys(), (sys.executable, PREFLIGHT, *arguments)
    result = run_command(*command, timeout=600, cwd=tmp_path, environment=store.environment)
    assert result.returncode == 0, result.stdout + result.stderr
    table, _, needed = result.stdout.partition("\n\n")
    verdicts = {line[:14].strip(): line[15:22].strip() for line in table.splitlines()[1:]}
    assert {"training", "SIGTERM", "resume", "export", "save_folder"} <= verdicts.keys()
    assert set(verdicts.values()) == {"ok"}
    for line in ("pace ", "time ", f"next: composer -n 1 {PREFLIGHT.with_name('train.py')} "):
        assert f"\n{line}" in needed
    assert store.objects(BUCKET).keys() == before
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_a_fault_of_the_training_is_named(tmp_path: Path, small_data: Path, labeled: Path) -> None:
    data = shutil.copytree(small_data, tmp_path / "data")
    next(data.glob("*.mds")).unlink()
    result = run_command(sys.executable, PREFLIGHT, *small_preflight(tmp_path / "run", data, labeled), timeout=600)
    assert result.returncode == 1, result.stdout + result.stderr
    assert re.search(r"\ntraining       FAILED  trained only 0 of 3.* error: .*shard", result.stdout)
    assert "\nexport         skipped" in result.stdout
    assert not [*(tmp_path / "run").rglob("*")]


@pytest.mark.slow
def test_a_preflight_that_is_stopped_leaves_no_process(tmp_path: Path, small_data: Path, labeled: Path) -> None:
    arguments = small_preflight(tmp_path / "run", small_data, labeled)
    process = subprocess.Popen([sys.executable, str(PREFLIGHT), *arguments], stdout=subprocess.DEVNULL, cwd=ROOT)
    wait_until(lambda: (tmp_path / "run" / ".d2v-preflight" / "log.jsonl").exists(), 300)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert not psutil.wait_procs(children, timeout=20)[1]


@pytest.mark.parametrize("is_remote", [False, slow(True)], ids=["folder", "store"])
def test_what_a_killed_preflight_left_does_not_stop_its_run(
    store: GatedStore, small_data: Path, tmp_path: Path, is_remote: bool
) -> None:
    left = tmp_path / "runs" / "killed" / ".d2v-preflight"
    left.mkdir(parents=True)
    (left / "log.jsonl").touch()
    store.client().put_object(Bucket=BUCKET, Key="runs/killed/.d2v-preflight/log.jsonl", Body=b"")
    folder = f"s3://{BUCKET}/runs/killed" if is_remote else "runs/killed"
    short = ("max_duration=1ba", "scheduler.t_warmup=0ba")
    arguments = small_run(left, small_data, f"save_folder={folder}", *short)
    run_training(*arguments, cwd=tmp_path, environment=store.environment)
    assert (left.parent / "latest-rank0.pt").exists()


def test_several_nodes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)  # other tests of this process may have joined a group
    monkeypatch.setattr(dist, "get_local_world_size", lambda: 2)
    with pytest.raises(InputError, match=r"composer -n 2 recipes/preflight\.py"):
        preflight.main(["any.yaml"])
