"""Promises 3, 10, 12 and 17 of targets that are normalized by fixed numbers, measured before the first step."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import layer_norm

from d2v_composer import DistillationModel, load_student, load_teacher
from helpers import (
    GOLDEN,
    assert_same_losses,
    assert_same_student,
    d2v,
    encoded_image,
    losses_of,
    refused_run,
    run_command,
    run_ranks,
    run_training,
    small_run,
    student_of,
    traced,
    train_command,
    train_until_killed,
)

MOMENTS = "objectives.tokens.dataset_norm.moments"
WHOLE = ["train_loader.crop_scale=[1,1]", "train_loader.crop_ratio=[1,1]", "train_loader.flip=0"]
DATASET = [
    "targets.normalization=dataset",
    "train_loader.shuffle=false",
    "device_eval_batch_size=10",
    "max_duration=8ba",
    *WHOLE,
]
TWO = "targets.dataset_batches=2"  # of 16


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Path:
    """Return the folder of a run in one process."""
    folder = tmp_path_factory.mktemp("dataset") / "run"
    variables = {"SAMPLES": str(folder.parent / "samples")}
    ended = run_command(sys.executable, *traced(small_run(folder, small_data, *DATASET, TWO)), environment=variables)
    assert ended.returncode == 0, ended.stderr
    return folder


def teachers_layers(count: int) -> tuple[Any, np.ndarray]:
    """Return the first images, and the teacher's layers of them, (L, B, T, D) float64."""
    teacher: Any = load_teacher(GOLDEN / "tiny_base.pt")
    pixels = [np.asarray(Image.open(io.BytesIO(encoded_image(seed)))) for seed in range(count)]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    _, layers = teacher.forward_blocks(teacher.encode(images))
    return images, torch.stack(layers).double().numpy()


def test_targets_are_normalized_by_the_first_batches(whole: Path) -> None:
    """And the loader begins its epoch again after them."""
    images, layers = teachers_layers(32)
    state, (samples,) = student_of(whole), (whole.parent / "samples").iterdir()
    total, squares = state[MOMENTS][:, 1:].unbind(dim=1)
    mean, deviation = layers.mean(axis=(1, 2)), layers.std(axis=(1, 2))
    assert (state[MOMENTS][:, 0] == 32).all()
    np.testing.assert_allclose(total / 32, mean, atol=1e-5 * deviation.mean())
    np.testing.assert_allclose((squares / 32 - (total / 32) ** 2).sqrt(), deviation, rtol=1e-5)
    read = [int(line.split()[1]) for line in samples.read_text().splitlines()]
    assert read[:96] == list(range(96))
    teacher: Any = load_teacher(GOLDEN / "tiny_base.pt")
    student = teacher.build_student(depth=3, normalization="dataset")
    model = DistillationModel(teacher, student, dataset_norm=True)
    model.load_state_dict(state)
    mean, deviation = mean[:, None, None], np.sqrt(deviation[:, None, None] ** 2 + 1e-5)
    expected = layer_norm(torch.from_numpy(((layers - mean) / deviation).mean(axis=0)), layers.shape[-1:], eps=1e-5)
    torch.testing.assert_close(model(images).target, expected.float(), rtol=0, atol=2e-5)


def test_a_killed_run_resumes_bit_for_bit_and_two_ranks_train_as_one(
    whole: Path, small_data: Path, tmp_path: Path
) -> None:
    arguments = small_run(tmp_path / "killed", small_data, *DATASET, TWO)
    train_until_killed(arguments, "batch_start 5")
    run_training(*arguments)
    assert_same_student(tmp_path / "killed", whole)
    ranks = small_run(tmp_path / "ranks", small_data, *DATASET, TWO, "train_loader.num_workers=1")
    run_ranks(*train_command(ranks)[1:])
    torch.testing.assert_close(student_of(tmp_path / "ranks")[MOMENTS], student_of(whole)[MOMENTS], rtol=1e-6, atol=0)
    assert_same_losses(losses_of(tmp_path / "ranks"), losses_of(whole), num_steps=8)
    line = refused_run([*arguments, "targets.dataset_batches=3", "max_duration=16ba"])
    assert "targets.dataset_batches: checkpoint has 2, config has 3" in line


def test_the_exported_file_needs_no_numbers(whole: Path, small_data: Path, tmp_path: Path) -> None:
    """17: embeddings are normalized by layer."""
    out = tmp_path / "student.safetensors"
    d2v("export", whole / "latest-rank0.pt", out)
    student: Any = load_student(out)
    assert student.config.normalization == "layer"
    assert not any("moments" in name for name in student.state_dict())


@pytest.mark.slow
def test_compiled_targets_are_the_same(whole: Path, small_data: Path, tmp_path: Path) -> None:
    """On a CPU the numbers are constants of the compiled program; a resume has them, too."""
    arguments = small_run(tmp_path, small_data, *DATASET, TWO, "compile=true")
    train_until_killed(arguments, "batch_start 5")
    run_training(*arguments)
    assert_same_losses(losses_of(tmp_path), losses_of(whole), num_steps=8)
