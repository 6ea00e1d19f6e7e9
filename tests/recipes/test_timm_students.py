"""A timm model as the student, from a YAML to a file that timm alone loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from composer import Callback
from composer.core import State
from composer.loggers import Logger
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from d2v_composer import load_student
from d2v_composer.commands.train import train
from d2v_composer.system.errors import InputError
from helpers import (
    GOLDEN,
    assert_same_student,
    d2v,
    failure,
    log_of,
    losses_of,
    run_ranks,
    run_training,
    small_run,
    student_of,
    succeed,
    train_command,
    train_until_killed,
    write_images,
)

NETWORK = ["student.depth=5", "student.model=timm/test_byobnet", "retrieval.representation=output", "max_duration=4ba"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    run_training(*small_run(folder, small_data, *NETWORK))
    return folder


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    path = trained.with_name("student.safetensors")
    succeed("export", trained / "latest-rank0.pt", path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_images(tmp_path / "photos", [f"{number}.jpg" for number in range(100)])


def test_another_version_of_timm_must_compute_the_same(exported: Path, tmp_path: Path) -> None:
    """A changed weight stands for a changed model."""
    with safe_open(exported, framework="pt") as file:
        tensors = load_file(exported)
        tensors["stem.conv.weight"] *= 2
        save_file(tensors, tmp_path / "student.safetensors", file.metadata())
    with pytest.raises(InputError, match="the installed timm gives different results for timm/test_byobnet"):
        load_student(tmp_path / "student.safetensors")


@pytest.mark.slow
def test_its_convolutions_are_quantized(exported: Path, photos: Path, tmp_path: Path) -> None:
    succeed("export", exported, tmp_path / "student.onnx")
    succeed("export", exported, tmp_path / "int8.onnx", "--int8", "--calibrate", photos)
    of_int8, of_float32 = ((tmp_path / f"{name}.onnx").stat().st_size for name in ("int8", "student"))
    assert of_int8 < 0.6 * of_float32


@pytest.mark.slow
def test_rivals_have_size_and_speed(trained: Path, photos: Path, tmp_path: Path) -> None:
    """A rival that takes other samples is refused."""
    sets, rival = f"datasets={{mine: {{format: folder, root: {photos}}}}}", GOLDEN / "tiny_alibi.pt"
    command = "evaluate", f"model={trained / 'latest-rank0.pt'}", sets, "probes=[instance]", f"out={tmp_path}"
    succeed(*command, f"rivals=[{rival}]")
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    (rated,) = [row for row in report["candidates"] if row["name"] == str(rival)]
    assert rated["parameters"] > 0
    assert all(rated["per_second"][size] > 0 for size in ("1", "64"))
    assert [row["name"] for row in report["candidates"] if not row["per_second"]] == ["pixels"]
    succeed(*command)
    assert not (tmp_path / "evaluation.png").exists()
    line = failure(d2v(*command, f"rivals=[{GOLDEN / 'audio_base.pt'}]"), 2)
    assert line.startswith("error: rivals: ")
    assert "expected a model for image samples, got a model for audio samples" in line


@pytest.mark.parametrize("name", ["test_byobnet", "test_vit_relpos"])
@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(small_data: Path, tmp_path: Path, name: str) -> None:
    """With BatchNorm's statistics, and with dropout, which timm gives some models."""
    changes = *NETWORK, f"student.model=timm/{name}", "save_interval=1ba"
    whole, killed = (small_run(tmp_path / run, small_data, *changes) for run in ("whole", "killed"))
    run_training(*whole)
    train_until_killed(killed, "batch_start 3")
    run_training(*killed)
    assert_same_student(tmp_path / "killed", tmp_path / "whole")


@pytest.fixture(scope="module")
def unlabeled(labeled: Path) -> str:
    """A set for retrieval."""
    return f"datasets={{mine: {{format: mds, root: {labeled}, label_column: null}}}}"


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory, small_data: Path, unlabeled: str) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "run"
    options = [*NETWORK, "max_duration=10ba", "save_num_checkpoints_to_keep=-1", f"retrieval.{unlabeled}"]
    run_ranks(*train_command(small_run(folder, small_data, *options))[1:])
    return folder


@pytest.mark.slow
def test_two_ranks_train_and_resume_bit_for_bit(
    on_two_ranks: Path, trained: Path, small_data: Path, tmp_path: Path
) -> None:
    """Each normalizes by its own half of a batch; the other rank resumes with rank 0's statistics."""
    losses, alone = losses_of(on_two_ranks), losses_of(trained)
    assert losses[9] < 0.3 * losses[0]
    assert losses[0] == pytest.approx(alone[0], rel=0.03)
    load = f"load_path={on_two_ranks / 'ep0-ba6-rank0.pt'}"
    run_ranks(*train_command(small_run(tmp_path / "run", small_data, *NETWORK, "max_duration=10ba", load))[1:])
    assert_same_student(tmp_path / "run", on_two_ranks)


def test_ranks_measure_what_is_saved(on_two_ranks: Path, unlabeled: str, tmp_path: Path) -> None:
    """With rank 0's statistics of BatchNorm, although each rank has its own after a batch."""
    arguments = [
        f"model={on_two_ranks / 'latest-rank0.pt'}",
        unlabeled,
        f"out={tmp_path}",
        "precision=fp32",
        "pooling=cls",
    ]
    succeed("evaluate", *arguments, "pooling=cls")
    rows = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    of_student = [row for row in rows if (row["candidate"], row["measure"]) == ("student", "agreement")]
    [share] = [row["value"] for row in of_student if row["embedding"] == "output_cls"]
    assert log_of(on_two_ranks)["metrics/mine/agreement@10"][10] == pytest.approx(share)


@pytest.mark.slow
def test_ranks_may_normalize_together(trained: Path, small_data: Path, tmp_path: Path) -> None:
    """By the guide's callback; torch does so on GPUs alone, and one process as ever."""
    layers: Any = timm.layers

    class Together(Callback):
        def init(self, state: State, logger: Logger) -> None:
            layers.convert_sync_batchnorm(state.model)

    trainer = train(small_run(tmp_path / "run", small_data, *NETWORK), [Together()])
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in trainer.state.model.modules())
    weights, expected = student_of(tmp_path / "run"), student_of(trained)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("student.depth=3", "student: depth: cannot be set for a student that is a timm model"),
        ("student.init=teacher_blocks", "student: init: cannot be set for a student that is a timm model"),
        ("student.model=resnet18", "student.model: must be timm/NAME"),
        ("student.model=timm/no_such", "student: model: no model 'timm/no_such'"),
        (
            "device_train_microbatch_size=15",
            "device_train_microbatch_size: student.model cannot be trained on microbatches of 1: Expected more than 1",
        ),
    ],
)
def test_settings_that_a_timm_student_cannot_have_are_refused(
    small_data: Path, tmp_path: Path, change: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(small_run(tmp_path / "run", small_data, *NETWORK, change))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_timm_would_compute_otherwise_is_not_trained(small_data: Path, tmp_path: Path) -> None:
    """timm's head has two layers after the pooled feature."""
    name = "timm/caformer_s18"
    problem = r"timm would not compute what the student computes \(a classifier or alignment must be one linear layer "
    problem += r"on output_cls\): .*is invalid for input of size"
    with pytest.raises(InputError, match=f"^student.model: {problem}"):
        train(small_run(tmp_path / "run", small_data, *NETWORK, f"student.model={name}"))
    assert not (tmp_path / "run").exists()
