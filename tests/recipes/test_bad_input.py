"""Bad input through the training command: one clear line, exit status 2, no traceback, nothing half-written."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_composer.system import command_line
from helpers import GOLDEN, encoded_image, small_run, write_mds
from recipes import train

SIZES = "modality_encoders.IMAGE.local_encoder.proj.weight"


@pytest.fixture
def answers(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> Callable[..., list[str]]:
    """Return a function that runs the command with wrong overrides and returns what it prints."""

    def run(*overrides: str) -> list[str]:
        arguments = small_run(tmp_path / "run", small_data, *overrides)
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            command_line.run(train.main)
        assert caught.value.code == 2
        lines = capfd.readouterr().err.strip().splitlines()
        assert not any("Traceback" in line for line in lines)
        return lines

    return run


@pytest.fixture
def answer(answers: Callable[..., list[str]]) -> Callable[..., str]:
    """Return a function that runs the command with one wrong thing and returns the line of its error."""

    def run(*overrides: str) -> str:
        line = answers(*overrides)[-1]
        assert line.startswith("error: ")
        return line

    return run


def test_each_problem_has_a_line(answers: Callable[..., list[str]], tmp_path: Path) -> None:
    assert answers("seed=-1", "teacher.checkpoint=x", "load_path=y") == [
        "error: seed: must be at least 0, got -1",
        "error: teacher.checkpoint: x: no such file",
        "error: load_path: y: no such file",
    ]
    assert not (tmp_path / "run").exists()


def changed_teacher(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    checkpoint = torch.load(GOLDEN / "tiny_base.pt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    return path


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def test_a_missing_teacher_is_refused(answer: Callable[..., str], tmp_path: Path) -> None:
    assert answer("teacher.checkpoint=nowhere.pt") == "error: teacher.checkpoint: nowhere.pt: no such file"
    assert not (tmp_path / "run").exists()


def test_a_truncated_teacher_is_refused(answer: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "teacher.pt"
    path.write_bytes((GOLDEN / "tiny_base.pt").read_bytes()[:100_000])
    assert "teacher.pt: truncated, or not a PyTorch checkpoint" in answer(f"teacher.checkpoint={path}")
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_text_is_refused(answer: Callable[..., str], tmp_path: Path) -> None:
    def to_text(checkpoint: dict[str, Any]) -> None:
        model = checkpoint["model"]
        checkpoint["model"] = {name.replace("IMAGE", "TEXT"): tensor for name, tensor in model.items()}

    path = changed_teacher(tmp_path / "teacher.pt", to_text)
    assert "text checkpoints are not supported, because" in answer(f"teacher.checkpoint={path}")


def test_a_teacher_with_a_wrong_shape_is_refused(answer: Callable[..., str], tmp_path: Path) -> None:
    def cut(checkpoint: dict[str, Any]) -> None:
        checkpoint["model"][SIZES] = checkpoint["model"][SIZES][..., :7]

    path = changed_teacher(tmp_path / "teacher.pt", cut)
    line = answer(f"teacher.checkpoint={path}")
    assert f"{SIZES} has shape (48, 3, 8, 7), the sizes ask for (48, 3, 8, 8)" in line
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_would_run_code_is_refused(answer: Callable[..., str], tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = changed_teacher(tmp_path / "teacher.pt", lambda checkpoint: checkpoint.update(cfg=Code(canary)))
    assert "not a data2vec 2.0 checkpoint: it has no dict cfg['model']" in answer(f"teacher.checkpoint={path}")
    assert not canary.exists()
    assert not (tmp_path / "run").exists()


def test_a_warmup_longer_than_the_run_is_refused_in_other_units_too(answer: Callable[..., str], tmp_path: Path) -> None:
    line = answer("max_duration=2ep", "scheduler.t_warmup=13ba")
    assert "must not be longer than max_duration 2ep, got 13ba with 6 batches an epoch" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("sead=3", "sead: no such key; did you mean seed?"),
        ("train_loader.remot=x", "train_loader.remot: no such key; did you mean remote?"),
        (
            "optimizer.weight_decay=little",
            "optimizer.weight_decay: Value 'little' of type 'str' could not be converted",
        ),
        ("global_train_batch_size=97", "has 96 samples, fewer than one batch of global_train_batch_size 97"),
        ("student.num_heads=5", "student: student num_heads must divide the width 48, got 5"),
        ("targets.average_top_k_layers=4", "average_top_k_layers: must be at most the teacher's depth 3, got 4"),
        ("callbacks.speed_monitor.window_size=abc", "window_size: must be a number of at least 1, got 'abc'"),
        ("callbacks.speed_monitor.time_unit=abc", "callbacks.speed_monitor: "),
        ("save_folder=/proc/nothing", "save_folder: /proc/nothing: cannot be written: /proc is not writable "),
        ("load_path=nowhere.pt", "load_path: nowhere.pt: no such file"),
        ("retrieval.datasets={x: {format: mds, root: nowhere}}", "nowhere/train: no index.json: no such folder"),
    ],
)
def test_a_wrong_setting_is_refused(answer: Callable[..., str], tmp_path: Path, override: str, line: str) -> None:
    assert line in answer(override)
    assert not (tmp_path / "run").exists()


def test_an_empty_data_folder_is_refused(answer: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty: no index.json: not an MDS data set" in answer(f"train_loader.local={tmp_path / 'empty'}")
    assert not (tmp_path / "run").exists()


def test_a_corrupt_index_is_refused(answer: Callable[..., str], small_data: Path, tmp_path: Path) -> None:
    data = shutil.copytree(small_data, tmp_path / "data")
    (data / "index.json").write_text("{")
    assert "index.json: corrupt, or not an MDS index" in answer(f"train_loader.local={data}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_ends_the_run_in_one_line(
    answer: Callable[..., str], tmp_path: Path, num_workers: int
) -> None:
    images = [encoded_image(i) for i in range(31)]
    data = write_mds(tmp_path / "data", [*images, b"not a picture"])
    line = answer(f"train_loader.local={data}", f"train_loader.num_workers={num_workers}")
    assert line.startswith("error: sample 31 of ")
    assert line.endswith("data: not an image that can be read (13 bytes)")
