"""The fine-tuning command as a user runs it: it learns, resumes, refuses bad input; timm loads its classifier."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from d2v_composer import load_teacher
from d2v_composer.checkpoints.load import save_student
from d2v_composer.config.load import load_finetune_config
from d2v_composer.config.reference import load_any
from d2v_composer.evaluation.run_log import read_jsonl
from d2v_composer.sources.labeled import load_labeled_set
from d2v_composer.system.errors import InputError
from helpers import (
    GOLDEN,
    QUICKSTART,
    ROOT,
    assert_same_student,
    encoded_image,
    failure,
    losses_of,
    run_command,
    run_ranks,
    student_of,
    succeed,
    train_until_killed,
    write_mds,
)

KEYS = ("candidate", "embedding", "bank", "k")
SCRIPT = ROOT / "recipes" / "finetune.py"
MIXED = ("algorithms.mixup={}",)
# Of a killed run: event and batch. A checkpoint is saved at each even batch, an evaluation follows batches 6 and 12.
MOMENTS = (
    "batch_start 5",
    "fit_start 0",
    "batch_start 0",
    "after_backward 2",
    "batch_end 4",
    "batch_checkpoint 4",
    "batch_end 6",
    "eval_start 6",
    "eval_batch_end 6",
    "epoch_start 6",
    "before_forward 11",
    "eval_end 12",
)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported student of the tiny teacher."""
    torch.manual_seed(3)
    file = tmp_path_factory.mktemp("student") / "student.safetensors"
    save_student(load_teacher(GOLDEN / "tiny_base.pt").build_student(depth=2), file)
    return file


def small_finetuning(folder: Path, model: Path, data: Path, *overrides: str) -> list[str]:
    """The arguments of a tiny fine-tuning: 12 batches, 6 an epoch, 6 checkpoints."""
    return [
        str(ROOT / "yamls" / "finetune.yaml"),
        f"model={model}",
        f"dataset={{format: mds, root: {data}}}",
        f"save_folder={folder}",
        "precision=fp32",
        "max_duration=12ba",
        "global_train_batch_size=16",
        "scheduler.t_warmup=2ba",
        "save_interval=2ba",
        "train_loader.num_workers=0",
        "report=false",  # seconds
        *overrides,
    ]


def finetune(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    ended = run_command(sys.executable, SCRIPT, *arguments)
    assert ended.returncode == status, ended.stderr
    return ended


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory, student: Path, labeled: Path) -> Path:
    """The folder of a fine-tuning that was never interrupted."""
    folder = tmp_path_factory.mktemp("finetuned") / "run"
    result = finetune(*small_finetuning(folder, student, labeled))
    assert "Warning" not in result.stderr  # the test images are fewer than a batch of an evaluation
    return folder


def test_blocks_and_head_are_trained_and_the_encoder_keeps_its_bits(finetuned: Path, student: Path) -> None:
    before, after = load_file(student), student_of(finetuned)
    encoder = [name for name in before if name.startswith("encoder.")]
    blocks = [name for name in before if name.startswith("blocks.")]
    assert encoder
    assert all(torch.equal(before[name], after[f"backbone.{name}"]) for name in encoder)
    assert not any(torch.equal(before[name], after[f"backbone.{name}"]) for name in blocks)
    assert after["head.weight"].abs().max() > 0


def test_a_tuned_encoder_stands_in_no_other_models_row(student: Path, labeled: Path, tmp_path: Path) -> None:
    """An evaluation takes the encoder, also for the untrained student, from the teacher, or leaves both out."""
    arguments = small_finetuning(tmp_path / "run", student, labeled, "train_encoder=true", "max_duration=2ba")
    finetune(*arguments, "scheduler.t_warmup=0ba")
    tables, said = {}, ""
    for name, (model, *options) in {
        "before": (student, f"teacher={GOLDEN / 'tiny_base.pt'}"),
        "after": (tmp_path / "run" / "latest-rank0.pt", f"teacher={GOLDEN / 'tiny_base.pt'}"),
        "alone": (tmp_path / "run" / "latest-rank0.pt",),
    }.items():
        sets, out = f"datasets={{small: {{format: mds, root: {labeled}}}}}", tmp_path / name
        ended = succeed("evaluate", f"model={model}", sets, f"out={out}", "representation=output", *options)
        said, rows = ended.stderr, json.loads((out / "evaluation.json").read_text())["results"]
        tables[name] = {tuple(row[key] for key in KEYS): row["value"] for row in rows}
    assert {row for row, *_ in tables["alone"]} == {"pixels", "student"}
    assert "the untrained student is not measured: a tuned encoder needs the teacher; give teacher=PATH" in said
    changed = {key for key, value in tables["before"].items() if tables["after"][key] != value}
    assert {row for row, *_ in changed} == {"student"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, student: Path, labeled: Path) -> Path:
    """The folder of a fine-tuning with mixed labels that was never interrupted."""
    folder = tmp_path_factory.mktemp("mixed") / "run"
    whole = finetune(*small_finetuning(folder, student, labeled, *MIXED))
    assert "images    96 for training, 48 for testing, 4 classes" in whole.stdout
    return folder


@pytest.mark.parametrize(
    "moment", [MOMENTS[0], *(pytest.param(moment, marks=pytest.mark.slow) for moment in MOMENTS[1:])]
)
def test_a_killed_run_resumes_bit_for_bit(
    moment: str, mixed: Path, student: Path, labeled: Path, tmp_path: Path
) -> None:
    """With mixed labels, and any number of workers."""
    arguments = small_finetuning(tmp_path, student, labeled, *MIXED, "train_loader.num_workers=2")
    train_until_killed(arguments, moment, "finetune")
    finetune(*arguments)
    assert losses_of(tmp_path) == losses_of(mixed)
    assert_same_student(tmp_path, mixed)


@pytest.mark.slow
def test_a_run_killed_in_its_last_evaluation_is_evaluated_by_the_same_command(
    student: Path, labeled: Path, tmp_path: Path
) -> None:
    options = ("max_duration=4ba", "eval_interval=3ba")
    whole = finetune(*small_finetuning(tmp_path / "whole", student, labeled, *options))
    arguments = small_finetuning(tmp_path / "killed", student, labeled, *options)
    train_until_killed(arguments, "eval_start 4", "finetune")
    assert sorted(read_jsonl(tmp_path / "killed" / "log.jsonl")["metrics/test/top1"]) == [3]
    again = finetune(*arguments)
    ours, expected = (read_jsonl(tmp_path / folder / "log.jsonl") for folder in ("killed", "whole"))
    for key in ("metrics/test/top1", "metrics/test/loss"):
        assert ours[key] == expected[key]
        assert sorted(ours[key]) == [3, 4]
    table = next(part for part in whole.stdout.split("\n\n") if "batch 4, accuracy in %" in part)
    assert table.splitlines()[:3] == again.stdout[again.stdout.index(table.splitlines()[0]) :].splitlines()[:3]


def test_two_ranks_train_and_evaluate_as_one(finetuned: Path, student: Path, labeled: Path, tmp_path: Path) -> None:
    arguments = small_finetuning(tmp_path, student, labeled)
    run_ranks(SCRIPT, *arguments)
    ours, expected = (read_jsonl(folder / "log.jsonl") for folder in (tmp_path, finetuned))
    for key in ("loss/train/total", "metrics/test/top1", "metrics/test/loss"):
        assert ours[key].keys() == expected[key].keys()
        np.testing.assert_allclose(list(ours[key].values()), list(expected[key].values()), rtol=1e-5)


def test_a_label_beyond_the_classes_is_one_line(student: Path, labeled: Path, tmp_path: Path) -> None:
    write_mds(tmp_path / "train", [encoded_image(i) for i in range(32)], [4] * 32)
    shutil.copytree(labeled / "test", tmp_path / "test")
    options = ("train_loader.num_workers=1",)
    line = failure(finetune(*small_finetuning(tmp_path / "run", student, tmp_path, *options), status=2), 2)
    assert re.search(rf"sample \d+ of {tmp_path}/train: its label must be a number from 0 to 3, got 4$", line)


@pytest.mark.slow
def test_a_teacher_learns_to_classify_real_images(tmp_path: Path) -> None:
    options = ("max_duration=16ba", "global_train_batch_size=32", "eval_interval=16ba", "report=true")
    model, images = QUICKSTART / "teacher.safetensors", QUICKSTART / "cifar10"
    result = finetune(*small_finetuning(tmp_path, model, images, *options))
    assert read_jsonl(tmp_path / "log.jsonl")["metrics/test/top1"][16] > 0.2  # chance is 0.1
    assert "evaluation at batch 16: top-1 " in result.stderr
    assert "test images, batch 16, accuracy in %" in result.stdout
    assert "top-1 on the test images" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "report" / "accuracy.png").is_file()


def test_the_classifier_loads_in_timm_with_its_head(finetuned: Path, labeled: Path, tmp_path: Path) -> None:
    out = tmp_path / "classifier.safetensors"
    exported = run_command(sys.executable, "-m", "d2v_composer.commands", "export", finetuned / "latest-rank0.pt", out)
    assert exported.returncode == 0, exported.stderr
    assert "'d2v2_student', num_classes=4, checkpoint_path=" in exported.stdout
    model: Any = timm.create_model("d2v2_student", checkpoint_path=str(out), num_classes=4).eval()
    test = load_labeled_set("mds", labeled, image_size=32, interpolation="bicubic").test
    with torch.no_grad():
        logits = model(model.encoder.prepare(test.samples))
        student, teacher = load_any(finetuned / "latest-rank0.pt")
        _, named = load_any(finetuned / "latest-rank0.pt", teacher=str(GOLDEN / "tiny_base.pt"))
    assert student is not None
    assert teacher is None
    assert named is not None
    pooled = model.forward_head(model.forward_features(model.encoder.prepare(test.samples)), pre_logits=True)
    torch.testing.assert_close(student.embed(test.samples), pooled.detach())
    accuracy = (logits.argmax(1) == test.labels).float().mean()
    assert read_jsonl(finetuned / "log.jsonl")["metrics/test/top1"][12] == pytest.approx(float(accuracy))
    with pytest.raises(ValueError, match="is a classifier file; expected a "):
        load_any(out)


def test_a_fine_tuned_student_is_fine_tuned_again_with_a_new_head(
    finetuned: Path, labeled: Path, tmp_path: Path
) -> None:
    finetune(*small_finetuning(tmp_path, finetuned / "latest-rank0.pt", labeled, "max_duration=2ba"))
    assert not any(name.startswith("backbone.head.") for name in student_of(tmp_path))
    student, _ = load_any(tmp_path / "latest-rank0.pt")  # as export and evaluate do
    assert student is not None


SLIPS = {
    "algorithms.cutmix: must be null with mixup": ["algorithms.mixup={}", "algorithms.cutmix={}"],
    "dataset.format: must be mds, got folder; write ROOT/train": ["dataset.format=folder"],
    "callbacks.health: must be null in a fine-tuning run": ["callbacks={health: {}}"],
}


@pytest.mark.parametrize(("message", "overrides"), SLIPS.items())
def test_a_slip_is_one_line(message: str, overrides: list[str], student: Path, labeled: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_finetune_config(small_finetuning(tmp_path, student, labeled, *overrides))
    assert len(caught.value.args) == 1
    assert str(caught.value).startswith(message)


def test_a_run_that_cannot_be_is_one_line(finetuned: Path, student: Path, labeled: Path, tmp_path: Path) -> None:
    """Too few images, before anything is written, and a resume with other features."""
    arguments = small_finetuning(tmp_path / "run", student, labeled)
    line = failure(finetune(*arguments, "global_train_batch_size=97", status=2), 2)
    assert line.endswith("train has 96 samples, fewer than one batch of global_train_batch_size 97")
    assert not (tmp_path / "run").exists()
    line = failure(finetune(*arguments, "pooling=mean", f"load_path={finetuned / 'ep1-ba10-rank0.pt'}", status=2), 2)
    assert "pooling: checkpoint has cls, config has mean" in line


def test_a_resume_keeps_its_test_images(finetuned: Path, student: Path, labeled: Path, tmp_path: Path) -> None:
    """Also if only a label differs."""
    shutil.copytree(labeled / "train", tmp_path / "train")
    write_mds(tmp_path / "test", [encoded_image(i) for i in range(48)], [*(i % 4 for i in range(47)), 0])
    line = failure(finetune(*small_finetuning(finetuned, student, tmp_path, "max_duration=14ba"), status=2), 2)
    assert ".pt: dataset (sha256 of the test samples): checkpoint has " in line
