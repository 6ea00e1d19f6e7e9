"""The recipe for detectors: it trains, is killed and resumes; its backbone starts as the student."""

import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from d2v_composer import load_teacher
from d2v_composer.checkpoints.load import save_student
from helpers import GOLDEN, ROOT, load_checkpoint, run_command, run_ranks, traced

SCRIPT = ROOT / "recipes" / "detect.py"
STUDENTS: dict[str, Any] = {
    "resnet": {"model": "timm/test_resnet"},
    "vit": {"model": "timm/test_vit"},
    "blocks": {"depth": 2},
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 scenes for training, 5 for testing."""
    folder = tmp_path_factory.mktemp("scenes") / "made"
    made = run_command(sys.executable, ROOT / "tests/makers/scenes.py", folder, "--train=12", "--test=5")
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, teacher = tmp_path_factory.mktemp("students"), load_teacher(GOLDEN / "tiny_base.pt")
    for name, options in STUDENTS.items():
        save_student(teacher.build_student(**options), folder / f"{name}.safetensors")
    return folder


def arguments(student: Path, scenes: Path, out: Path) -> list[str]:
    """A run of 2 epochs with 3 batches of 4 each."""
    options = {"student": student, "data": scenes, "out": out, "image-size": 32, "batch-size": 4, "max-duration": "2ep"}
    return [f"--{name}={value}" for name, value in options.items()]


def test_it_is_killed_and_resumes(students: Path, scenes: Path, tmp_path: Path) -> None:
    whole = arguments(students / "resnet.safetensors", scenes, tmp_path / "whole")
    shown = run_command(sys.executable, SCRIPT, *whole)
    assert "'map':" in shown.stdout, shown.stderr

    part = arguments(students / "resnet.safetensors", scenes, tmp_path / "part")
    killed = run_command(sys.executable, *traced(part, "detect"), environment={"AT": "batch_start 4 kill"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run_command(sys.executable, SCRIPT, *part)
    assert resumed.returncode == 0, resumed.stderr
    ends = [load_checkpoint(tmp_path / name / "latest-rank0.pt")["state"] for name in ("part", "whole")]
    assert [end["timestamp"]["Timestamp"]["batch"] for end in ends] == [6, 6]

    # timm loads the trained backbone by its names.
    net: Any = timm.create_model("test_resnet", features_only=True, feature_cls="getter")
    trained = load_file(tmp_path / "part/backbone.safetensors")
    assert trained.keys() == net.model.state_dict().keys()
    prefix = "net.backbone.body.model."
    assert all(torch.equal(tensor, ends[0]["model"][prefix + name]) for name, tensor in trained.items())


@pytest.mark.parametrize("name", STUDENTS)
def test_a_backbone_starts_with_the_students_weights(name: str, students: Path) -> None:
    recipe: Any = runpy.run_path(str(SCRIPT))
    file = students / f"{name}.safetensors"
    body: Any = recipe["Pyramid"](str(file), 32).body.model
    stored = load_file(file)
    weights = body.state_dict()
    assert len(weights) > 20
    assert all(torch.equal(weights[key], stored[key.removeprefix("student.")]) for key in weights)


def test_two_ranks_measure_together(students: Path, scenes: Path, tmp_path: Path) -> None:
    """With 5 scenes for testing, one rank has one more than the other."""
    run_ranks(SCRIPT, *arguments(students / "blocks.safetensors", scenes, tmp_path), ranks=2)
    assert "metrics/eval/map" in (tmp_path / "log0.txt").read_text()
