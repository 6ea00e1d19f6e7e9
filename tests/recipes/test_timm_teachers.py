"""A timm model as the teacher, of tokens and of an image embedding that texts share: from a YAML to measures."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize
from torch.testing import assert_close

import d2v_composer.timm_models  # noqa: F401  (registers the student)
from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.load import save_student
from d2v_composer.commands import embed, evaluate
from d2v_composer.sources.labeled import load_labeled_set
from d2v_composer.system.errors import InputError
from helpers import (
    ROOT,
    assert_same_losses,
    d2v,
    log_of,
    losses_of,
    run_command,
    run_ranks,
    run_training,
    small_run,
    student_of,
    succeed,
    train_command,
)
from recipes import train
from small_students import computed_by_timm_alone
from small_vits import random_vit


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of timm's test_vit, 6 blocks of width 64, with a projection to 128 channels, as of CLIP."""
    path = tmp_path_factory.mktemp("timm") / "test_vit.safetensors"
    save_file(random_vit("test_vit", noise=0.05, num_classes=128).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def classes(teacher: Path) -> Path:
    path = teacher.with_name("classes.npy")
    np.save(path, np.random.default_rng(0).normal(size=(4, 128)))
    return path


def arguments(folder: Path, data: Path, teacher: Path, *overrides: str) -> list[str]:
    """Return the arguments of a tiny run that regresses tokens and image embedding: 3 x 4 patches of 16 pixels."""
    options = ["teacher.model=timm/test_vit", f"teacher.checkpoint={teacher}", "teacher.image_size=48x64"]
    return small_run(folder, data, *options, "max_duration=4ba", "objectives.embedding={weight: 0.5}", *overrides)


def sets_of(labeled: Path, classes: Path) -> str:
    return f"datasets={{four: {{format: mds, root: {labeled}, class_embeddings: {classes}}}}}"


@pytest.fixture(scope="module")
def trained(
    teacher: Path, classes: Path, small_data: Path, labeled: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    retrieval = [f"retrieval.{sets_of(labeled, classes)}", "retrieval.probes=[zero_shot]"]
    run_training(*arguments(folder, small_data, teacher, *retrieval, "callbacks.health.interval=2ba"))
    return folder


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    path = trained.with_name("student.safetensors")
    succeed("export", trained / "latest-rank0.pt", path)
    return path


def top1(embeddings: torch.Tensor, classes: Path, labels: torch.Tensor) -> float:
    cosines = normalize(embeddings) @ normalize(torch.from_numpy(np.load(classes)).float()).T
    return (cosines.argmax(dim=1) == labels).double().mean().item()


def test_losses_and_zero_shot_are_logged(
    trained: Path, teacher: Path, classes: Path, exported: Path, labeled: Path
) -> None:
    log = log_of(trained)
    for step in range(4):
        tokens, embedding, total = (log[f"loss/train/{name}"][step] for name in ("tokens", "embedding", "total"))
        assert total == pytest.approx(tokens + 0.5 * embedding)
        assert 0 < embedding < 2
    test = load_labeled_set("mds", labeled, image_size=(48, 64)).test
    whole = load_teacher(teacher, model="timm/test_vit", image_size="48x64")
    for prefix, model, batch in (("", load_student(exported), 4), ("teacher/", whole, 0)):
        with torch.no_grad():
            expected = top1(model.embed(test.samples), classes, test.labels)
        assert log[f"metrics/four/{prefix}zero_shot/top1"][batch] == pytest.approx(expected)
    assert {name.split(".")[1] for name in student_of(trained)} == {"blocks", "alignment"}


@pytest.mark.slow
def test_a_compiled_run_in_bfloat16_is_close(trained: Path, teacher: Path, small_data: Path, tmp_path: Path) -> None:
    train.main(arguments(tmp_path, small_data, teacher, "compile=true", "precision=amp_bf16"))
    assert losses_of(tmp_path) == pytest.approx(losses_of(trained), rel=0.02)


@pytest.mark.slow
def test_files_give_the_embedding(exported: Path, tmp_path: Path) -> None:
    student, images = load_student(exported), torch.randn(3, 3, 48, 64)
    expected = student.embed(images)
    assert student.embedding[:3] == ("joint", "training", 128)
    for suffix in ("onnx", "pt2"):
        succeed("export", exported, tmp_path / f"student.{suffix}")
    (embeddings,) = onnxruntime.InferenceSession(tmp_path / "student.onnx").run(None, {"images": images.numpy()})
    assert_close(torch.from_numpy(embeddings), expected, rtol=1e-4, atol=1e-4)
    program = torch.export.load(tmp_path / "student.pt2", extra_files=(extra := {"preprocessing.json": ""}))
    assert_close(program.module()(images), expected)
    assert json.loads(extra["preprocessing.json"])["image_size"] == [48, 64]
    model: Any = timm.create_model("d2v2_student", num_classes=128, checkpoint_path=exported).eval()
    assert_close(model(images), expected)
    classifier: Any = timm.create_model("d2v2_student", checkpoint_path=exported, num_classes=3)
    assert classifier(images).shape == (3, 3)


def test_student_and_timm_teacher_embed(exported: Path, teacher: Path, labeled: Path, tmp_path: Path) -> None:
    of_timm, out = ["timm/test_vit", "--checkpoint", str(teacher), "--image-size", "48x64"], tmp_path / "embeddings.npy"
    for model, width in (
        ([str(exported)], 128),
        ([*of_timm, "--first-blocks", "2"], 128),
        ([*of_timm, "--pooling", "cls"], 64),
    ):
        name, *options = model
        embed.main([name, str(labeled / "test"), str(out), *options, "--overwrite"])
        assert np.load(out).shape == (48, width)


def test_an_evaluation_compares_zero_shot(
    exported: Path, teacher: Path, classes: Path, labeled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [f"model={exported}", f"teacher={teacher}", sets_of(labeled, classes)]
    evaluate.main([*models, "probes=[zero_shot]", "ks=[1,3]", f"out={tmp_path}"])
    shown = capsys.readouterr().out
    assert "Zero-shot classification of the test samples by text embeddings of the classes on four, embedding" in shown
    report = json.loads((tmp_path / "evaluation.json").read_text())
    names = [candidate["name"] for candidate in report["candidates"]]
    assert names == ["pixels", "untrained student", "student", "teacher"]
    zero_shot = {(row["candidate"], row["k"]): row for row in report["results"] if row["measure"] == "zero_shot"}
    assert zero_shot.keys() == {(name, k) for name in names[1:] for k in (1, 3)}
    assert all(row["embedding"] == "embedding" and row["low"] <= row["value"] for row in zero_shot.values())


@pytest.mark.slow
def test_zero_shot_is_kept(tmp_path: Path) -> None:
    """Minutes on one core, with a small CLIP-like pair: chance is 0.1, and a student before training is near it."""
    made = run_command(sys.executable, ROOT / "tests" / "makers" / "clip_pair.py", tmp_path, timeout=900)
    assert made.returncode == 0, made.stderr
    run_training(
        str(ROOT / "yamls" / "quickstart.yaml"),
        "teacher.model=timm/test_vit",
        f"teacher.checkpoint={tmp_path / 'teacher.safetensors'}",
        "teacher.image_size=64",
        "student.depth=2",
        "objectives={tokens: {weight: 0}, embedding: {weight: 1}}",
        f"retrieval.datasets.cifar10.class_embeddings={tmp_path / 'classes.npy'}",
        "retrieval.probes=[zero_shot]",
        "retrieval.baselines=[teacher]",
        "max_duration=400ba",
        "retrieval.interval=400ba",
        "precision=fp32",
        "report=false",
        f"save_folder={tmp_path / 'run'}",
        timeout=900,
    )
    log = log_of(tmp_path / "run")
    student, teacher = (log[f"metrics/cifar10/{name}zero_shot/top1"] for name in ("", "teacher/"))
    untrained, trained, whole = student[0], student[400], teacher[max(teacher)]
    print(f"zero-shot top-1: teacher {whole:.3f}, student {trained:.3f}, untrained {untrained:.3f}")
    assert f"top-1 of the pair: {whole:.4f}" in made.stdout
    assert whole > 0.3
    assert trained > untrained + 0.6 * (whole - untrained)


@pytest.mark.slow
def test_timm_alone_loads_an_aligned_student(
    teacher: Path, classes: Path, small_data: Path, labeled: Path, tmp_path: Path
) -> None:
    network = ["student.depth=5", "student.model=timm/test_byobnet", "retrieval.representation=output"]
    run_training(*arguments(tmp_path / "run", small_data, teacher, *network, "objectives.tokens.weight=0"))
    out = tmp_path / "student.safetensors"
    succeed("export", tmp_path / "run" / "latest-rank0.pt", out)
    student: Any = load_student(out)
    pixels = student.encoder.prepare(torch.randint(0, 256, (4, 3, 48, 64), dtype=torch.uint8))
    assert_close(computed_by_timm_alone(tmp_path, pixels), student.embed(pixels))
    assert "teacher's own" not in (tmp_path / "README.md").read_text()
    succeed("export", out, tmp_path / "student.onnx")
    ended = d2v("evaluate", f"model={out}", f"teacher={teacher}", sets_of(labeled, classes), "probes=[zero_shot]")
    assert "zero-shot top-1" in ended.stdout, ended.stderr


def test_a_narrower_student_learns_an_alignment(teacher: Path, small_data: Path, tmp_path: Path) -> None:
    """A checkpoint holds it, and two ranks train as one process."""
    changes = ["student.embed_dim=16", "objectives.tokens.weight=0"]
    run_training(*arguments(tmp_path / "run", small_data, teacher, *changes))
    assert "student.alignment.weight" in student_of(tmp_path / "run")
    run_ranks(*train_command(arguments(tmp_path / "ranks", small_data, teacher, *changes))[1:])
    assert_same_losses(losses_of(tmp_path / "ranks"), losses_of(tmp_path / "run"), num_steps=4)


def test_a_map_to_another_embedding_is_not_compared_with_texts(
    exported: Path, classes: Path, labeled: Path, tmp_path: Path
) -> None:
    student, out = load_student(exported), tmp_path / "student.safetensors"
    assert student.alignment is not None
    student.alignment.of = "output_cls"
    save_student(student, out)
    with pytest.raises(InputError, match="zero_shot needs the embedding 'joint', got "):
        evaluate.main([f"model={out}", sets_of(labeled, classes), "probes=[zero_shot]"])


TEXTS = "retrieval.datasets.four.class_embeddings"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ("teacher.model=timm/resnet18", "ResNet"),
        ("teacher.first_blocks=6", "teacher.first_blocks"),
        ("teacher.image_size=40", "image_size"),
        ("student.init=teacher_blocks", "init"),
        ("objectives.tokens.weight=0 objectives.embedding.weight=0", "objectives.tokens.weight"),
        ("objectives.embedding.weight=0 alignment.max_samples=0", "zero_shot"),
        (f"{TEXTS}=FOLDER/narrow.npy", "class_embeddings"),
        (f"{TEXTS}=FOLDER/missing.npy", "missing.npy"),
        (f"{TEXTS}=null", "columns"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: str, named: str, small_data: Path, labeled: Path, teacher: Path, classes: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "narrow.npy", np.ones((4, 64)))
    zero_shot = [f"retrieval.{sets_of(labeled, classes)}", "retrieval.probes=[zero_shot]"]
    overrides = changes.replace("FOLDER", str(tmp_path)).split()
    with pytest.raises(InputError, match=re.escape(named)) as caught:
        train.main(arguments(tmp_path / "run", small_data, teacher, *zero_shot, *overrides))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
