"""A timm model as the student, from a YAML to a file that timm alone loads."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from composer import Callback
from composer.core import State
from composer.loggers import Logger
from safetensors import safe_open
from safetensors.torch import save_file

from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.load import save_student
from d2v_composer.commands.train import train
from d2v_composer.config.reference import load_any
from d2v_composer.data.images import Images
from d2v_composer.system.errors import InputError
from helpers import (
    GOLDEN,
    ROOT,
    assert_same_student,
    d2v,
    encoded_image,
    failure,
    log_of,
    losses_of,
    run_command,
    run_ranks,
    run_training,
    small_run,
    student_of,
    succeed,
    train_command,
    train_until_killed,
    write_mds,
)
from small_students import computed_by_timm_alone

NETWORK = ["student.depth=5", "student.model=timm/test_byobnet", "retrieval.representation=output"]
NETWORK += ["max_duration=4ba"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 100 images."""
    folder = tmp_path_factory.mktemp("images")
    for seed in range(100):
        (folder / f"{seed}.jpg").write_bytes(encoded_image(seed))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    run_training(*small_run(folder, small_data, *NETWORK))
    return folder


@pytest.mark.slow
def test_timm_alone_loads_it(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "student.safetensors"
    d2v("export", trained / "latest-rank0.pt", out)
    student: Any = load_student(out)
    pixels = student.encoder.prepare(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8))
    torch.testing.assert_close(computed_by_timm_alone(tmp_path, "embeddings", pixels), student.embed(pixels, "cls"))
    assert "teacher's own" not in (tmp_path / "README.md").read_text()


def test_another_version_of_timm_must_compute_the_same(trained: Path, tmp_path: Path) -> None:
    """A changed weight stands for a changed model."""
    out = tmp_path / "student.safetensors"
    d2v("export", trained / "latest-rank0.pt", out)
    with safe_open(out, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(
        {name: 2 * tensor if name == "stem.conv.weight" else tensor for name, tensor in tensors.items()}, out, metadata
    )
    with pytest.raises(InputError, match="the installed timm gives different results for timm/test_byobnet"):
        load_student(out)


@pytest.mark.slow
def test_what_takes_a_student_takes_it(trained: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "student.safetensors"
    d2v("export", trained / "latest-rank0.pt", out)
    d2v("embed", out, images, tmp_path / "embeddings.npy")
    assert len(np.load(tmp_path / "embeddings.npy")) == 100
    d2v("export", out, tmp_path / "student.onnx")
    succeed("export", out, tmp_path / "int8.onnx", "--int8", "--calibrate", images)
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in ("int8", "student")]
    assert sizes[0] < 0.6 * sizes[1]  # of convolutions
    sets = f"datasets={{mine: {{format: folder, root: {images}}}}}"
    evaluated = succeed("evaluate", f"model={out}", sets, f"out={tmp_path / 'evaluated.json'}")
    assert "untrained student" in evaluated.stdout


@pytest.mark.slow
def test_rivals_stand_in_the_same_tables(trained: Path, images: Path, tmp_path: Path) -> None:
    """With size and speed; one that takes other samples is refused."""
    out = tmp_path / "evaluated"
    model, rival = trained / "latest-rank0.pt", GOLDEN / "tiny_alibi.pt"
    arguments = [f"model={model}", f"datasets={{mine: {{format: folder, root: {images}}}}}", "probes=[instance]"]
    succeed("evaluate", *arguments, f"rivals=[{rival}]", f"out={out}")
    report = json.loads((out / "evaluation.json").read_text())
    shown = (out / "evaluation.png").read_bytes()
    succeed("evaluate", *arguments, f"out={out}")
    assert not (out / "evaluation.png").exists()
    (rated,) = [row for row in report["candidates"] if row["name"] == str(rival)]
    assert rated["parameters"] > 0
    assert shown.startswith(b"\x89PNG")
    assert all(rated["per_second"][size] > 0 for size in ("1", "64"))
    assert {row["candidate"] for row in report["results"]} >= {str(rival), "student", "teacher"}
    assert len(report["candidates"]) == 1 + len([row for row in report["candidates"] if row["per_second"]])  # pixels
    refused = d2v("evaluate", *arguments, f"rivals=[{GOLDEN / 'audio_base.pt'}]")
    assert "rivals: " in failure(refused, 2)
    assert "takes audio, but the model takes image" in refused.stderr


@pytest.mark.parametrize("name", [pytest.param("test_byobnet", marks=pytest.mark.slow), "test_vit_relpos"])
def test_a_killed_run_resumes_bit_for_bit(small_data: Path, tmp_path: Path, name: str) -> None:
    """With BatchNorm's statistics, and with dropout, which timm gives some models."""
    whole, killed = (
        small_run(
            tmp_path / run, small_data, *NETWORK, f"student.model=timm/{name}", "max_duration=4ba", "save_interval=1ba"
        )
        for run in ("whole", "killed")
    )
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
    arguments = [f"model={on_two_ranks / 'latest-rank0.pt'}", unlabeled, f"out={tmp_path}", "precision=fp32"]
    succeed("evaluate", *arguments)
    rows = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    of_student = [row for row in rows if (row["candidate"], row["measure"]) == ("student", "agreement")]
    agreements = {row["embedding"]: row["value"] for row in of_student}
    assert agreements
    for embedding, share in agreements.items():
        measured = log_of(on_two_ranks)[f"metrics/mine/agreement@10/{embedding}"][10]
        assert measured == pytest.approx(share), embedding


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
        ("student.depth=3", "student: depth: applies only to blocks on the teacher's encoder"),
        ("student.init=teacher_blocks", "student: init: applies only to blocks on the teacher's encoder"),
        ("student.model=resnet18", "student.model: must be timm/NAME"),
        ("student.model=timm/no_such", "student: model: no model 'timm/no_such'"),
        (
            "device_train_microbatch_size=15",
            "device_train_microbatch_size: student.model cannot be trained on 1 at a time: Expected more than 1 value",
        ),
    ],
)
def test_what_cannot_be(small_data: Path, tmp_path: Path, change: str, message: str) -> None:
    ended = run_command(*train_command(small_run(tmp_path / "run", small_data, *NETWORK, change)))
    assert message in failure(ended, 2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["efficientvit_m0", pytest.param("shvit_s1", marks=pytest.mark.slow)])
def test_what_timm_would_compute_otherwise_is_not_trained(small_data: Path, tmp_path: Path, name: str) -> None:
    """A BatchNorm of timm's head comes before what would be the projection, or a classifier."""
    model, folders = f"student.model=timm/{name}", [tmp_path / "run", tmp_path / "tuned"]
    aligned = [model, "objectives.embedding.weight=1", "retrieval.representation=projected"]
    distilling = run_command(*train_command(small_run(folders[0], small_data, *NETWORK, *aligned)))
    student = load_teacher(GOLDEN / "tiny_base.pt").build_student(model=f"timm/{name}")
    save_student(student, tmp_path / "student.safetensors")
    finetune = [ROOT / "recipes" / "finetune.py", ROOT / "yamls" / "finetune.yaml"]
    changes = [f"model={tmp_path / 'student.safetensors'}", f"save_folder={folders[1]}", "precision=fp32"]
    tuning = run_command(sys.executable, *finetune, *changes)
    for key, ended in (("student.model", distilling), ("model", tuning)):
        problem = "timm would not compute what the student computes; a classifier or projection must be one linear "
        problem += "layer on output_cls"
        assert failure(ended, 2) == f"error: {key}: {problem}: the outputs differ"
    assert not any(folder.exists() for folder in folders)


def test_a_classifier_is_timms_own(trained: Path, tmp_path: Path) -> None:
    """The ranks have tested what is exported."""
    for split, count in (("train", 32), ("test", 16)):
        labels = [seed % 2 for seed in range(count)]
        write_mds(tmp_path / "labeled" / split, [encoded_image(seed) for seed in range(count)], labels)
    save_student(load_any(trained / "latest-rank0.pt")[0], tmp_path / "student.safetensors")
    changes = [
        f"model={tmp_path / 'student.safetensors'}",  # with outputs of the encoder, which changes
        f"dataset={{format: mds, root: {tmp_path / 'labeled'}}}",
        f"save_folder={tmp_path / 'tuned'}",
        "train_encoder=true",
        "max_duration=4ba",
        "global_train_batch_size=8",
        "precision=fp32",
        "scheduler.t_warmup=1ba",
        "train_loader.num_workers=0",
    ]
    run_ranks(ROOT / "recipes" / "finetune.py", ROOT / "yamls" / "finetune.yaml", *changes)
    out = tmp_path / "classifier.safetensors"
    exported = d2v("export", tmp_path / "tuned" / "latest-rank0.pt", out)
    exec(exported.stdout.splitlines()[-1].removeprefix("next: "), printed := dict[str, Any]())
    assert printed["model"].eval().get_classifier().weight.any()
    classifier, _ = load_any(tmp_path / "tuned" / "latest-rank0.pt")
    images = torch.stack([Images().decode(encoded_image(seed), "") for seed in range(16)])
    logits = printed["model"](classifier.encoder.prepare(images)).detach()
    torch.testing.assert_close(logits, classifier.head(classifier.embed(images, "cls")))
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(16) % 2).item()
    assert log_of(tmp_path / "tuned")["metrics/test/loss"][4] == pytest.approx(loss, rel=1e-4)
    assert yaml.safe_load((tmp_path / "tuned" / "run.yaml").read_text())["model"]["pooling"] == "cls"
