"""Composer's Trainer over Streaming's own dataset, with the model, callbacks and algorithms of this package."""

import importlib.util
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from torchvision.transforms import Resize

from d2v_composer import load_config, load_student, train_student
from gated_store import GatedStore
from helpers import (
    GOLDEN,
    ROOT,
    assert_same_losses,
    losses_of,
    run_command,
    run_ranks,
    small_run,
    started_ranks,
    traced,
    wait_until,
)

SCRIPT = ROOT / "recipes" / "stock.py"


def arguments(folder: Path, labeled: Path, **options: Any) -> list[str]:
    """A run of 6 batches of 32, 3 an epoch, that saves and measures every second batch."""
    usual = {
        "teacher": GOLDEN / "tiny_base.pt",
        "local": labeled / "train",
        "labeled": labeled,
        "save_folder": folder / "run",
        "out": folder / "out",
        "max_duration": "6ba",
        "interval": "2ba",
    }
    return [f"--{name.replace('_', '-')}={value}" for name, value in (usual | options).items()]


def scalars(folder: Path, files: str = "*") -> dict[str, dict[int, float]]:
    """Return key → step → value of the scalars that TensorBoard shows of a run."""
    series: dict[str, dict[int, float]] = {}
    for file in sorted(folder.rglob(f"events.out.tfevents.{files}")):
        events = EventAccumulator(str(file)).Reload()
        for key in events.Tags()["scalars"]:
            series.setdefault(key, {}).update({event.step: event.value for event in events.Scalars(key)})
    return series


def loaded_script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, with images that are resized instead of cropped at random, and without workers."""
    spec = importlib.util.spec_from_file_location("stock", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RandomResizedCrop", lambda side, scale: Resize((side, side)))
    monkeypatch.setattr(module, "RandomHorizontalFlip", lambda: lambda image: image)
    monkeypatch.setattr(module, "DataLoader", lambda *given, num_workers, **named: DataLoader(*given, **named))
    return module


def test_its_losses_are_a_runs_on_the_same_batches(
    labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    stock = loaded_script(monkeypatch)
    given = arguments(tmp_path, labeled, max_duration="20ba", interval="20ba")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given])
    stock.main()

    train = shutil.copytree(labeled / "train", tmp_path / "train")  # Streaming lets only one data set read a folder
    images = stock.Images(local=str(train), batch_size=32, shuffle=True, shuffle_seed=17)
    resize = stock.Compose([Resize((32, 32)), stock.PILToTensor()])
    loader = DataLoader(images, 32, collate_fn=lambda batch: torch.stack([*map(resize, batch)]))
    settings = small_run(
        tmp_path / "ours",
        tmp_path / "unread",
        "student.depth=5",
        "max_duration=20ba",
        "global_train_batch_size=32",
        "scheduler.t_warmup=0.1dur",
        "optimizer.decay_norms_and_biases=true",
    )
    train_student(load_config(settings), train_dataloader=loader)
    shown = scalars(tmp_path / "out")
    assert_same_losses(shown["loss/train/total"], losses_of(tmp_path / "ours"), 20)
    assert "throughput/samples_per_sec" in shown


def assert_ended(folder: Path, steps: list[int]) -> None:
    """Check that the newest process trained these batches, that TensorBoard shows each callback, and the map."""
    newest = max((folder / "out").rglob("events.*"), key=lambda file: file.stat().st_mtime)
    process = newest.name.split(".")[-2]  # each process writes several files
    assert list(scalars(folder / "out", f"*.{process}.*")["loss/train/total"]) == steps
    shown = scalars(folder / "out")
    top1 = "metrics/cifar10/bank_train/top1"
    assert shown.keys() >= {top1, "lr-AdamW/group0", "l2_norm/grad/global", "health/prediction_error"}
    assert shown[top1].keys() >= {4, 6}
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert load_student(folder / "out/student.safetensors").embed_all(images)["embedding"].isfinite().all()


@pytest.mark.slow
def test_it_is_killed_and_resumes(labeled: Path, tmp_path: Path) -> None:
    given = arguments(tmp_path, labeled)
    killed = run_command(sys.executable, *traced(given, "stock"), environment={"AT": "batch_start 5 kill"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "run/latest-rank0.pt").resolve().name == "ep1-ba4-rank0.pt"
    resumed = run_command(sys.executable, SCRIPT, *given)
    assert resumed.returncode == 0, resumed.stderr
    assert_ended(tmp_path, [4, 5])
    (tmp_path / "out/student.safetensors").unlink()
    again = run_command(sys.executable, SCRIPT, *given)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out/student.safetensors").exists()


@pytest.mark.slow
def test_two_ranks_are_killed_and_resume_from_a_store(labeled: Path, tmp_path: Path, object_store: GatedStore) -> None:
    """Composer points at an uploaded checkpoint half a minute later, at the end of a batch."""
    object_store.create_bucket_of_images("stock", labeled / "train")
    address = object_store.create_bucket("stock-run")
    places = {
        "remote": "s3://stock/images",
        "local": tmp_path / "cache",
        "save_folder": f"{address}/run",
        "max_duration": "24ba",
    }
    given = arguments(tmp_path, labeled, **places)
    environment = object_store.environment | {"SLOW": "8"}
    pointer = "run/latest-rank0.pt.symlink"
    folders = (tmp_path, tmp_path)  # Composer writes what it finds in the store below the working folder
    with started_ranks(*traced(given, "stock"), ranks=2, environment=environment, folders=folders) as ranks:

        def is_saved() -> bool:
            assert all(rank.poll() is None for rank in ranks), [rank.stderr for rank in ranks]
            return pointer in object_store.objects("stock-run")

        wait_until(is_saved, seconds=280)
        for rank in ranks:
            rank.kill()
    saved = int(re.findall(rb"ba(\d+)", object_store.objects("stock-run")[pointer])[0])
    run_ranks(str(SCRIPT), *given, ranks=2, environment=object_store.environment, folders=folders)
    assert_ended(tmp_path, [*range(saved, 24)])
