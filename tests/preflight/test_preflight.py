"""The preflight finds and names what would end a run, and leaves nothing behind."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from d2v_composer import preflight
from d2v_composer.builders import data as builders_data
from d2v_composer.config import load
from d2v_composer.config.load import load_config
from d2v_composer.data.index import read_index
from d2v_composer.data.labeled import LabeledImages, LabeledSet
from d2v_composer.preflight import (
    Checks,
    CheckTable,
    Measured,
    Nodes,
    check_before_training,
    free_port,
    in_batches,
    needs,
)
from d2v_composer.system.errors import InputError
from gated_store import GatedStore
from helpers import ROOT, command_environment, run_command, small_run

PREFLIGHT = ROOT / "recipes" / "preflight.py"
ONE_NODE = Nodes(0, 1, 1, None)
BUCKET = "preflight"


@pytest.fixture(autouse=True)
def brief_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "DECODING_SECONDS", 0.05)


def small_preflight(folder: Path | str, data: Path, labeled: Path, *overrides: str) -> list[str]:
    """Arguments of a tiny run with retrieval, health and a worker."""
    sets = f"retrieval.datasets={{small: {{format: mds, root: {labeled}}}}}"
    return small_run(data, data, sets, f"save_folder={folder}", "train_loader.num_workers=1", *overrides)


def failures(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    """Make the checks before the rehearsal, and return the findings of the failed ones."""
    table = CheckTable()
    check_before_training(Checks(load_config(arguments), ONE_NODE), table)
    capsys.readouterr()
    return {row.name: row.found for row in table.rows if row.verdict == "FAILED"}


def test_a_good_run_passes_and_nothing_is_left(tmp_path: Path, small_data: Path, labeled: Path) -> None:
    arguments = small_preflight(tmp_path / "runs" / "good", small_data, labeled)
    result = run_command(sys.executable, PREFLIGHT, *arguments, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line.split(maxsplit=2) for line in result.stdout.splitlines()[1:]]
    verdicts = {row[0]: row[1] for row in rows[: [not row for row in rows].index(True)]}
    assert {"training", "SIGTERM", "resume", "retrieval", "export"} <= verdicts.keys()
    assert "FAILED" not in verdicts.values()
    for needed in ("pace", "time", "checkpoints", "memory", "data workers"):
        assert f"\n{needed} " in result.stdout
    assert f"\nnext: composer -n 1 {PREFLIGHT.with_name('train.py')} " in result.stdout
    assert not list(tmp_path.iterdir())


def test_every_fault_before_training_is_named_at_once(
    tmp_path: Path,
    small_data: Path,
    labeled: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Teacher, data, a save_folder that is not writable any more, labeled sets, an MLflow server."""
    monkeypatch.setattr(load, "find_unwritable", lambda folder: None)  # when the YAML was read
    data = tmp_path / "data"
    shutil.copytree(small_data, data)
    next(data.glob("*.mds")).unlink()
    arguments = small_preflight(Path("/proc/run"), data, labeled)
    (tmp_path / "teacher.pt").write_bytes(b"cut")
    found = failures(capsys, *arguments, f"teacher.checkpoint={tmp_path / 'teacher.pt'}")
    assert "teacher.pt: truncated, or not a PyTorch checkpoint" in found["teacher"]
    assert "the shard is missing" in found["data"]
    assert "/proc/run: no permission to write" in found["save_folder"]

    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "index.json").write_text("{")
    sets = f"retrieval.datasets={{small: {{format: mds, root: {tmp_path}}}}}"
    mlflow = f"loggers={{mlflow: {{tracking_uri: 'http://127.0.0.1:{free_port()}'}}}}"
    found = failures(capsys, *arguments, sets, "student.num_heads=7", mlflow)
    assert "refused" in found["loggers"]
    assert "train/index.json: corrupt" in found["labeled sets"]
    assert "must divide" in found["student"] or "7" in found["student"]


def test_a_full_disk_is_named(
    tmp_path: Path,
    small_data: Path,
    labeled: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = small_preflight(tmp_path / "run", small_data, labeled)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 0))
    found = failures(capsys, *arguments)
    assert "run: 3 checkpoints need" in found["room"]
    assert "/dev/shm: 0 of 1,000,000,000 bytes are free" in found["shared memory"]


def test_a_node_needs_room_only_for_its_share(
    tmp_path: Path, many_shards: Path, labeled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for two thirds of the data set suffices for one of two nodes."""
    overrides = ("train_loader.remote=s3://bucket/images", "train_loader.num_canonical_nodes=2", "save_folder=null")
    config = load_config(small_preflight(tmp_path, tmp_path / "cache", labeled, *overrides))
    node = Checks(config, Nodes(1, 2, 1, None))
    node.shards = read_index(many_shards, columns=("image",))
    total = node.num_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(total, total, 2 * total // 3))
    assert "cache in" in node.check_room()
    monkeypatch.setattr(builders_data, "shards_of_node", lambda sizes, *_: np.arange(len(sizes)))
    with pytest.raises(InputError, match="shards are still to come"):
        node.check_room()


def test_another_version_of_a_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {name: preflight.metadata.version(name) for name in ("torch", "mosaicml")}
    assert versions["torch"] in preflight.check_versions()
    installed = preflight.metadata.version
    monkeypatch.setattr(preflight.metadata, "version", lambda name: "1.0" if name == "timm" else installed(name))
    with pytest.raises(ValueError, match=r"^does not work with timm 1\.0: pip install 'timm[^']+'$"):
        preflight.check_versions()


def test_the_needs_of_the_whole_run(tmp_path: Path, small_data: Path, labeled: Path) -> None:
    """By hand: 30,000 batches of 256 at 1,280 images/s are 6,000 s; 6 retrievals of 8 s for 256 of 512 images, 96 s."""
    config = load_config(
        small_preflight(
            tmp_path,
            small_data,
            labeled,
            "max_duration=30000ba",
            "global_train_batch_size=256",
            "retrieval.interval=5000ba",
            "save_interval=1000ba",
            "save_num_checkpoints_to_keep=3",
            "train_loader.num_workers=4",
        )
    )
    images = LabeledImages(torch.zeros(256, 3, 1, 1, dtype=torch.uint8), torch.zeros(256, dtype=torch.int64))
    run = Checks(config, Nodes(0, 2, 4, None))
    run.decoded_per_core, run.sets = 400.0, {"a": LabeledSet(images, images)}
    run.shards = [{"samples": 1_281_167, "raw_data": {"bytes": 10**11}}]
    text = "\n".join(needs(run, Measured(1280.0, 0.2, 8.0, 0.0, 2 * 10**9, 354_500_000)))
    assert "1,280 images/s on 8 rank(s), 20% of it" in text
    assert "1.7 h for 30,000 batches, 0.0 h of it in 6 retrievals (at most): 13.5 rank-hours" in text
    assert "31 of 354 MB, 3 kept: 1.4 GB at most" in text
    assert "2.0 cores per node decode the 800 images/s" in text
    assert "configured: 16 worker(s)" in text


@pytest.mark.parametrize(("text", "batches"), [("5000ba", 5000), ("2ep", 20), ("0.1dur", 100), ("0ba", 1)])
def test_durations_in_batches(text: str, batches: int) -> None:
    assert in_batches(text, total=1000, per_epoch=10) == batches


def test_few_images_are_evenly_spaced() -> None:
    images = LabeledImages(torch.arange(10)[:, None, None, None], torch.arange(10))
    assert images.at_most(4).labels.tolist() == [0, 2, 5, 7]
    assert images.at_most(4).images.flatten().tolist() == [0, 2, 5, 7]
    assert images.at_most(11) is images


@pytest.fixture(scope="session")
def store(object_store: GatedStore, small_data: Path) -> GatedStore:
    """The store with the small data set."""
    object_store.create_bucket_of_images(BUCKET, small_data)
    return object_store


def remote_preflight(tmp_path: Path, labeled: Path) -> list[str]:
    """Arguments of a tiny run that reads from the store and saves to it."""
    remote = f"train_loader.remote=s3://{BUCKET}/images"
    return small_preflight(f"s3://{BUCKET}/runs/small", tmp_path / "cache", labeled, remote)


def test_faults_of_a_store_are_named(
    store: GatedStore,
    small_data: Path,
    tmp_path: Path,
    labeled: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A denied write, a missing shard and a full disk."""
    arguments = remote_preflight(tmp_path, labeled)
    for variable, value in store.environment.items():
        monkeypatch.setenv(variable, value)
    assert failures(capsys, *arguments) == {}
    assert not store.objects(BUCKET, "runs/")

    shard = sorted(small_data.glob("*.mds"))[1].name
    store.client().delete_object(Bucket=BUCKET, Key=f"images/{shard}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", store.reader_environment["AWS_ACCESS_KEY_ID"])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 0))
    try:
        found = failures(capsys, *arguments)
        assert found.keys() == {"listing", "save_folder", "room", "shared memory"}
        assert f"1 of {len(list(small_data.glob('*.mds')))} shards are missing, first {shard}" in found["listing"]
        assert "s3://preflight/runs/small: no permission to write (" in found["save_folder"]
        assert "are still to come, 0.0 GB of the disk are free" in found["room"]
    finally:
        store.client().upload_file(str(small_data / shard), BUCKET, f"images/{shard}")


@pytest.mark.slow
def test_a_run_in_a_store_passes_and_nothing_is_left(store: GatedStore, tmp_path: Path, labeled: Path) -> None:
    before = store.objects(BUCKET).keys()
    arguments = remote_preflight(tmp_path, labeled)
    result = run_command(
        sys.executable, PREFLIGHT, *arguments, timeout=300, cwd=tmp_path, environment=store.environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    composers_own = {".credentials_validated_successfully"}  # at a bucket's root
    assert store.objects(BUCKET).keys() - composers_own == before
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# A training script with a fault that it really had once.
PLANTED = """
import importlib.util, sys
import torch
{fault}
spec = importlib.util.spec_from_file_location("train", {train!r})
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)
from d2v_composer.system import cli
cli.run(train.main)
"""
FAULTS = {
    # The examined batch is on another device than the model.
    "training": """
from d2v_composer.callbacks.health import Health
measure = Health.measure
def measure_elsewhere(self, state, logger):
    self.microbatch = {name: value.to("meta") for name, value in self.microbatch.items() if torch.is_tensor(value)}
    measure(self, state, logger)
Health.measure = measure_elsewhere
""",
    # Data workers end at SIGTERM, before the current batch is done.
    "SIGTERM": """
import signal
from d2v_composer.system import worker_lifetime
def end_at_sigterm():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
worker_lifetime.end_with_parent = end_at_sigterm
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("phase", FAULTS)
def test_a_planted_fault_is_found_by_the_rehearsal(tmp_path: Path, small_data: Path, labeled: Path, phase: str) -> None:
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    shutil.copy(PREFLIGHT, recipes)
    (recipes / "train.py").write_text(PLANTED.format(fault=FAULTS[phase], train=str(ROOT / "recipes" / "train.py")))
    arguments = small_preflight(tmp_path / "run", small_data, labeled)
    result = run_command(sys.executable, recipes / "preflight.py", *arguments, timeout=300)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"\n{phase:14} FAILED" in result.stdout
    assert "\nexport         skipped" in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_preflight_that_is_stopped_leaves_nothing(tmp_path: Path, small_data: Path, labeled: Path) -> None:
    arguments = small_preflight(tmp_path / "run", small_data, labeled)
    process = subprocess.Popen([sys.executable, str(PREFLIGHT), *arguments], stdout=subprocess.DEVNULL, cwd=ROOT)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run").glob("preflight-*/log.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list((tmp_path / "run").glob("preflight-*/log.jsonl"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_nodes_rehearse_together(tmp_path: Path, small_data: Path, labeled: Path) -> None:
    """Both tables show the failures of either node, and both launchers exit with the same status."""
    port = str(free_port())
    arguments = small_preflight(tmp_path / "run", small_data, labeled)

    def start(rank: int, *more: str) -> subprocess.Popen[str]:
        place = ["--nproc", "1", "--world_size", "2", "--node_rank", str(rank)]
        address = ["--master_addr", "127.0.0.1", "--master_port", port]
        command = [sys.executable, "-m", "composer.cli", *place, *address, str(PREFLIGHT), *arguments, *more]
        environment = command_environment()
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)

    def outputs(*nodes: subprocess.Popen[str]) -> list[str]:
        return [node.communicate(timeout=300)[0] for node in nodes]

    nodes = start(0), start(1)
    first, second = outputs(*nodes)
    assert [node.returncode for node in nodes] == [0, 0], first + second
    assert "images/s on 2 rank(s)" in first
    assert not (tmp_path / "run").exists()

    nodes = start(0), start(1, "teacher.checkpoint=missing.pt")
    first, second = outputs(*nodes)
    assert [node.returncode for node in nodes] == [1, 1], first + second
    assert "teacher        FAILED  on node 1: missing.pt: no such file" in first
    assert "training       skipped" in second
