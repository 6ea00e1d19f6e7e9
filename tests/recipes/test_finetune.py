"""The recipe for classifiers: each kind of model learns; a killed run resumes; timm loads the result."""

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

import d2v_composer.timm_models  # noqa: F401  (registers d2v2_student)
from d2v_composer import load_teacher
from d2v_composer.checkpoints.load import save_student
from helpers import GOLDEN, ROOT, encoded_image, load_checkpoint, run_command, run_ranks, traced, write_files

SCRIPT = ROOT / "recipes" / "finetune.py"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of 12 training and 5 test images of 3 classes."""
    names = {"train": 12, "test": 5}
    files = {
        f"{split}/{'abc'[n % 3]}/{n}.jpg": encoded_image(100 * len(split) + n, 32)
        for split, count in names.items()
        for n in range(count)
    }
    return write_files(tmp_path_factory.mktemp("photos"), files)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, teacher = tmp_path_factory.mktemp("models"), load_teacher(GOLDEN / "tiny_base.pt")
    save_student(teacher.build_student(depth=2), folder / "blocks.safetensors")
    save_student(teacher.build_student(model="timm/test_resnet"), folder / "resnet.safetensors")
    (folder / "teacher.pt").symlink_to(GOLDEN / "tiny_base.pt")
    return folder


def arguments(model: Path, photos: Path, out: Path) -> list[str]:
    """A run of 2 epochs with 3 batches of 4 each."""
    options = {"model": model, "data": photos, "out": out, "batch-size": 4, "max-duration": "2ep"}
    return [f"--{name}={value}" for name, value in options.items()]


def succeed(*command: Any) -> str:
    ended = run_command(sys.executable, *command)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_it_is_killed_and_resumes(models: Path, photos: Path, tmp_path: Path) -> None:
    given = arguments(models / "blocks.safetensors", photos, tmp_path)
    killed = run_command(sys.executable, *traced(given, "finetune"), environment={"AT": "batch_start 4 kill"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert load_checkpoint(tmp_path / "latest-rank0.pt")["state"]["timestamp"]["Timestamp"]["batch"] == 3
    assert "'MulticlassAccuracy':" in succeed(SCRIPT, *given)
    state = load_checkpoint(tmp_path / "latest-rank0.pt")["state"]
    assert state["timestamp"]["Timestamp"]["batch"] == 6

    saved, student = load_file(tmp_path / "classifier.safetensors"), load_file(models / "blocks.safetensors")
    assert all(torch.equal(tensor, state["model"][f"module.{name}"]) for name, tensor in saved.items())
    is_same = {
        name: torch.equal(student[name.removeprefix("student.")], saved[name]) for name in saved if "student" in name
    }
    assert all(is_same[name] == name.startswith("student.encoder.") for name in is_same)

    file = str(tmp_path / "classifier.safetensors")
    classifier: Any = timm.create_model("d2v2_student", checkpoint_path=file, num_classes=3)
    assert torch.equal(classifier.head.weight, saved["head.weight"])
    assert classifier.head.weight.any()


@pytest.mark.parametrize("model", ["resnet.safetensors", "teacher.pt"])
def test_other_models_are_trained(model: str, models: Path, photos: Path, tmp_path: Path) -> None:
    succeed(SCRIPT, *arguments(models / model, photos, tmp_path))
    saved = load_file(tmp_path / "classifier.safetensors")
    name = "head.weight" if "teacher" in model else "fc.weight"
    assert saved[name].shape[0] == 3
    if "teacher" not in model:
        timm.create_model("test_resnet", checkpoint_path=str(tmp_path / "classifier.safetensors"), num_classes=3)


def test_two_ranks_read_shards(models: Path, labeled: Path, tmp_path: Path) -> None:
    run_ranks(SCRIPT, *arguments(models / "blocks.safetensors", labeled, tmp_path), "--max-duration=1ep", ranks=2)
    assert "metrics/eval/MulticlassAccuracy" in (tmp_path / "log0.txt").read_text()
