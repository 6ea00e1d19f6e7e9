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

import d2v_composer.timm_models  # noqa: F401  (registers the student)
from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.load import save_student
from d2v_composer.config.load import load_finetune_config
from d2v_composer.config.reference import load_any
from d2v_composer.sources.labeled import LabeledSamples, eval_batches, load_labeled_set
from d2v_composer.system.errors import InputError
from helpers import (
    GOLDEN,
    QUICKSTART,
    ROOT,
    assert_same_student,
    datasets_of,
    encoded_image,
    failure,
    log_of,
    losses_of,
    run_command,
    run_ranks,
    slow,
    small_finetuning,
    student_of,
    succeed,
    train_until_killed,
    write_mds,
    write_words,
)

TEACHER = GOLDEN / "tiny_base.pt"
SCRIPT = ROOT / "recipes" / "finetune.py"
# Of a killed run: event and batch. A checkpoint is saved at each even batch, an evaluation follows batches 6 and 12.
MOMENTS = ["batch_start 5", "fit_start 0", "batch_start 0", "after_backward 2", "batch_end 4", "batch_checkpoint 4"]
MOMENTS += ["batch_end 6", "eval_start 6", "eval_batch_end 6", "epoch_start 6", "before_forward 11", "eval_end 12"]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported student of the tiny teacher."""
    torch.manual_seed(3)
    file = tmp_path_factory.mktemp("student") / "student.safetensors"
    save_student(load_teacher(TEACHER).build_student(depth=2), file)
    return file


def finetune(*arguments: str) -> subprocess.CompletedProcess[str]:
    ended = run_command(sys.executable, SCRIPT, *arguments)
    assert ended.returncode == 0, ended.stderr
    return ended


def refused(arguments: list[str]) -> str:
    return failure(run_command(sys.executable, SCRIPT, *arguments), 2)


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory, student: Path, labeled: Path) -> Path:
    """The folder of a fine-tuning that was never interrupted."""
    folder = tmp_path_factory.mktemp("finetuned") / "run"
    result = finetune(*small_finetuning(folder, student, labeled))
    assert "Warning" not in result.stderr  # the test images are fewer than a batch of an evaluation
    return folder


def accuracies_of(*options: str, out: Path) -> tuple[dict[tuple[str, ...], float], str]:
    """Return what an evaluation measures, by row, embedding, bank and k, and what it says on stderr."""
    said = succeed("evaluate", "representation=output", f"out={out}", *options).stderr
    rows = json.loads((out / "evaluation.json").read_text())["results"]
    return {tuple(row[key] for key in ("candidate", "embedding", "bank", "k")): row["value"] for row in rows}, said


def test_a_tuned_encoder_stands_in_no_other_models_row(student: Path, labeled: Path, tmp_path: Path) -> None:
    """An evaluation takes the encoder, also for the untrained student, from the teacher, or leaves both out."""
    changes = "train_encoder=true", "max_duration=2ba", "scheduler.t_warmup=0ba"
    finetune(*small_finetuning(tmp_path / "run", student, labeled, *changes))
    sets, teacher, tuned = datasets_of(labeled), f"teacher={TEACHER}", f"model={tmp_path / 'run' / 'latest-rank0.pt'}"
    before, _ = accuracies_of(sets, teacher, f"model={student}", out=tmp_path / "before")
    after, _ = accuracies_of(sets, teacher, tuned, out=tmp_path / "after")
    alone, said = accuracies_of(sets, tuned, out=tmp_path / "alone")
    assert {row for row, *_ in alone} == {"pixels", "student"}
    assert "the untrained student is not measured: its encoder came from the teacher; set teacher=PATH" in said
    assert {row[0] for row, value in before.items() if after[row] != value} == {"student"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, student: Path, labeled: Path) -> Path:
    """The folder of a fine-tuning with mixed labels that was never interrupted."""
    folder = tmp_path_factory.mktemp("mixed") / "run"
    whole = finetune(*small_finetuning(folder, student, labeled, "algorithms.mixup={}"))
    assert "images    96 for training, 48 for testing, 4 classes" in whole.stdout
    return folder


@pytest.mark.parametrize("moment", [MOMENTS[0], *(slow(moment) for moment in MOMENTS[1:])])
def test_a_killed_run_resumes_bit_for_bit(
    moment: str, mixed: Path, student: Path, labeled: Path, tmp_path: Path
) -> None:
    """With mixed labels, and any number of workers."""
    arguments = small_finetuning(tmp_path, student, labeled, "algorithms.mixup={}", "train_loader.num_workers=2")
    train_until_killed(arguments, moment, "finetune")
    finetune(*arguments)
    assert losses_of(tmp_path) == losses_of(mixed)
    assert_same_student(tmp_path, mixed)


@pytest.mark.slow
def test_a_run_killed_in_its_last_evaluation_is_evaluated_by_the_same_command(
    student: Path, labeled: Path, tmp_path: Path
) -> None:
    whole, killed = (
        small_finetuning(tmp_path / name, student, labeled, "max_duration=4ba", "eval_interval=3ba")
        for name in ("whole", "killed")
    )
    shown = finetune(*whole).stdout
    train_until_killed(killed, "eval_start 4", "finetune")
    assert sorted(log_of(tmp_path / "killed")["metrics/test/top1"]) == [3]
    again = finetune(*killed).stdout
    ours, expected = (log_of(tmp_path / name) for name in ("killed", "whole"))
    for key in ("metrics/test/top1", "metrics/test/loss"):
        assert ours[key] == expected[key]
        assert sorted(ours[key]) == [3, 4]
    [table] = re.findall("^test images, batch 4, accuracy in %\n.*\n.*\n", shown, re.MULTILINE)
    assert table in again


def test_two_ranks_train_and_evaluate_as_one(finetuned: Path, student: Path, labeled: Path, tmp_path: Path) -> None:
    run_ranks(SCRIPT, *small_finetuning(tmp_path, student, labeled))
    ours, expected = log_of(tmp_path), log_of(finetuned)
    for key in ("loss/train/total", "metrics/test/top1", "metrics/test/loss"):
        assert ours[key].keys() == expected[key].keys()
        np.testing.assert_allclose(list(ours[key].values()), list(expected[key].values()), rtol=1e-5)


def test_a_label_beyond_the_classes_is_one_line(student: Path, labeled: Path, tmp_path: Path) -> None:
    write_mds(tmp_path / "train", [encoded_image(i) for i in range(32)], [4] * 32)
    shutil.copytree(labeled / "test", tmp_path / "test")
    line = refused(small_finetuning(tmp_path / "run", student, tmp_path, "train_loader.num_workers=1"))
    assert re.search(rf"sample \d+ of {tmp_path}/train: its label must be a number from 0 to 3, got 4$", line)


@pytest.mark.slow
def test_a_teacher_learns_to_classify_real_images(tmp_path: Path) -> None:
    options = "max_duration=16ba", "global_train_batch_size=32", "eval_interval=16ba", "report=true"
    model, images = QUICKSTART / "teacher.safetensors", QUICKSTART / "cifar10"
    result = finetune(*small_finetuning(tmp_path, model, images, *options))
    assert log_of(tmp_path)["metrics/test/top1"][16] > 0.2  # chance is 0.1
    assert "batch 16: metrics/test/top1 " in result.stderr
    assert "test images, batch 16, accuracy in %" in result.stdout
    assert "top-1 on the test images" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "report" / "accuracy.png").is_file()


def test_the_classifier_loads_in_timm_with_its_head(finetuned: Path, labeled: Path, tmp_path: Path) -> None:
    out = tmp_path / "classifier.safetensors"
    exported = succeed("export", finetuned / "latest-rank0.pt", out)
    assert "'d2v2_student', num_classes=4, checkpoint_path=" in exported.stdout
    model: Any = timm.create_model("d2v2_student", checkpoint_path=str(out), num_classes=4).eval()
    test = load_labeled_set("mds", labeled, image_size=32, interpolation="bicubic").test
    student, teacher = load_any(finetuned / "latest-rank0.pt")
    assert teacher is None
    with torch.no_grad():
        images = model.student.encoder.prepare(test.samples)
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(student.embed(test.samples), pooled)
        accuracy = (model(images).argmax(1) == test.labels).double().mean().item()
    assert log_of(finetuned)["metrics/test/top1"][12] == pytest.approx(accuracy)
    again, _ = load_any(out)
    assert again.head is not None
    torch.testing.assert_close(again.head(again.embed(test.samples)), model(images))


def test_what_was_fine_tuned_is_aligned_again(finetuned: Path, small_data: Path, tmp_path: Path) -> None:
    """Its checkpoint, and its export; without a card in OUT's folder."""
    checkpoint, classifier = finetuned / "latest-rank0.pt", tmp_path / "classifier.safetensors"
    succeed("export", checkpoint, classifier)
    (folder := tmp_path / "aligned").mkdir()
    for number, model in enumerate((checkpoint, classifier)):
        succeed("align", model, small_data, out := folder / f"{number}.safetensors", "--to", TEACHER)
        assert load_student(out).embedding[:2] == ("output_cls", "alignment")
    assert sorted(path.name for path in folder.iterdir()) == ["0.safetensors", "1.safetensors"]


def test_a_fine_tuned_student_is_fine_tuned_again_with_a_new_head(
    finetuned: Path, labeled: Path, tmp_path: Path
) -> None:
    finetune(*small_finetuning(tmp_path, finetuned / "latest-rank0.pt", labeled, "max_duration=2ba"))
    assert not any(name.startswith("backbone.head.") for name in student_of(tmp_path))
    student, teacher = load_any(tmp_path / "latest-rank0.pt", teacher=str(TEACHER))  # as export and evaluate do
    assert student is not None
    assert teacher is not None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithms.mixup={}", "algorithms.cutmix={}"], "algorithms.cutmix: must be null with mixup"),
        (["dataset.format=folder"], "dataset.format: must be mds or null, got folder; write ROOT/train"),
        (["callbacks={health: {}}"], "callbacks.health: must be null in fine-tuning"),
    ],
)
def test_a_slip_is_one_line(overrides: list[str], message: str, student: Path, labeled: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^{message}") as caught:
        load_finetune_config(small_finetuning(tmp_path, student, labeled, *overrides))
    assert len(caught.value.args) == 1


def test_too_few_images_are_refused_before_anything_is_written(student: Path, labeled: Path, tmp_path: Path) -> None:
    line = refused(small_finetuning(tmp_path / "run", student, labeled, "global_train_batch_size=97"))
    assert line.endswith(
        "train has 96 samples, fewer than one batch of global_train_batch_size 97; lower global_train_batch_size"
    )
    assert not (tmp_path / "run").exists()


def test_a_resume_keeps_its_features(finetuned: Path, student: Path, labeled: Path) -> None:
    line = refused(small_finetuning(finetuned, student, labeled, "pooling=mean"))
    assert "embedding: checkpoint has output_cls, this run has output_mean" in line


def test_a_resume_keeps_its_test_images(finetuned: Path, student: Path, labeled: Path, tmp_path: Path) -> None:
    """Also if only a label differs."""
    shutil.copytree(labeled / "train", tmp_path / "train")
    write_mds(tmp_path / "test", [encoded_image(i) for i in range(48)], [*(i % 4 for i in range(47)), 0])
    line = refused(small_finetuning(finetuned, student, tmp_path, "max_duration=14ba"))
    assert ".pt: test data (sha256 of the samples): checkpoint has " in line


def test_batches_have_lengths_only_if_clips_are_padded() -> None:
    clips = [torch.full((size,), float(size)) for size in (1000, 900, 800, 800)]
    batches: Any = eval_batches(LabeledSamples(clips, torch.arange(4)), 2)
    (inputs, labels, lengths), (equal, last_labels) = batches
    assert (inputs.shape, lengths.tolist(), labels.tolist()) == ((2, 1000), [1000, 900], [0, 1])
    assert torch.equal(inputs[1, :900], clips[1])
    assert not inputs[1, 900:].any()
    assert torch.equal(equal, torch.stack(clips[2:]))
    assert last_labels.tolist() == [2, 3]


@pytest.mark.parametrize("train_encoder", ["false", "true"])
@pytest.mark.slow
def test_a_teacher_of_sound_learns_words(train_encoder: str, tmp_path: Path) -> None:
    write_words(tmp_path / "words", {"train": 16, "test": 8})
    for split in ("train", "test"):
        succeed("convert-audio", tmp_path / "words", tmp_path / "data" / split, "--split", split)
    arguments = small_finetuning(
        tmp_path / "run",
        GOLDEN / "audio_base.pt",
        tmp_path / "data",
        "train_loader={num_workers: 1, crop_scale: [0.08, 1.0], crop_seconds: 0.2}",
        f"train_encoder={train_encoder}",
        "max_duration=6ep",
        "device_train_microbatch_size=8",
    )
    ended = finetune(*arguments)
    assert "clips     48 for training, 24 for testing, 3 classes\n" in ended.stdout + ended.stderr
    [accuracy] = re.findall("^finetune +([0-9.]+)", ended.stdout, re.MULTILINE)
    assert float(accuracy) > 80
    line = refused([*arguments, "algorithms.mixup={}"])
    assert line == "error: algorithms.mixup: must be null, because the model takes clips"
