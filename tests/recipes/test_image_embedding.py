"""Students that keep a teacher's alignment with a text tower, from a YAML to files and measures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from torch.testing import assert_close

from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.load import save_student
from d2v_composer.commands import evaluate
from d2v_composer.sources.labeled import load_labeled_set
from d2v_composer.system.errors import InputError
from helpers import (
    assert_same_losses,
    d2v,
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
)
from small_students import computed_by_timm_alone
from small_vits import random_vit

PROJECTED = ["--representation", "projected"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of timm's test_vit with a projection to 128 channels, as of CLIP."""
    path = tmp_path_factory.mktemp("timm") / "test_vit.safetensors"
    save_file(random_vit("test_vit", noise=0.05, num_classes=128).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def classes(teacher: Path) -> Path:
    path = teacher.with_name("classes.npy")
    np.save(path, np.random.default_rng(0).normal(size=(4, 128)))
    return path


def arguments(folder: Path, data: Path, teacher: Path, *overrides: str) -> list[str]:
    """Return the arguments of a tiny run that regresses tokens and image embedding."""
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
    run_training(*arguments(folder, small_data, teacher, *retrieval, "retrieval.representation=projected"))
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
    models = "", load_student(exported)
    whole = "teacher/", load_teacher(teacher, model="timm/test_vit", image_size="48x64", projected=True)
    for prefix, model in (models, whole):
        with torch.no_grad():
            expected = top1(model.embed(test.samples, representation="projected"), classes, test.labels)
        for name in ("zero_shot/top1", "zero_shot/top1/projected_cls"):
            assert log[f"metrics/four/{prefix}{name}"][4 if not prefix else 0] == pytest.approx(expected)
    assert {name.split(".")[1] for name in student_of(trained)} == {"blocks"}  # the head is frozen


@pytest.mark.slow
def test_files_have_the_teachers_head(exported: Path, teacher: Path, labeled: Path, tmp_path: Path) -> None:
    tensors, theirs = load_file(exported), load_file(teacher)
    assert torch.equal(tensors["projection.model.head.weight"], theirs["head.weight"])
    assert torch.equal(tensors["projection.norm.weight"], theirs["norm.weight"])
    student, images = load_student(exported), torch.randn(3, 3, 48, 64)
    expected = student.embed(images, representation="projected")
    normed = torch.nn.functional.layer_norm(
        student.embed(images), (64,), theirs["norm.weight"], theirs["norm.bias"], eps=1e-6
    )
    assert_close(expected, normed @ theirs["head.weight"].T + theirs["head.bias"])
    for suffix in ("onnx", "pt2"):  # of the run's primary embedding
        succeed("export", exported, tmp_path / f"student.{suffix}")
    (embeddings,) = onnxruntime.InferenceSession(tmp_path / "student.onnx").run(None, {"images": images.numpy()})
    assert_close(torch.from_numpy(embeddings), expected, rtol=1e-4, atol=1e-4)
    program = torch.export.load(tmp_path / "student.pt2", extra_files=(extra := {"preprocessing.json": ""}))
    assert_close(program.module()(images), expected)
    assert json.loads(extra["preprocessing.json"])["image_size"] == [48, 64]
    for options in ([exported], ["timm/test_vit", "--checkpoint", teacher, "--image-size", "48x64", *PROJECTED]):
        model, *flags = options
        ended = d2v("embed", model, labeled / "test", tmp_path / "found.npy", *flags, "--overwrite")
        assert "48 embeddings of 128 dimensions" in ended.stdout, ended.stderr
    model: Any = timm.create_model("d2v2_student", checkpoint_path=exported).eval()
    assert_close(model(images), expected)
    classifier: Any = timm.create_model("d2v2_student", checkpoint_path=exported, num_classes=3)
    assert classifier(images).shape == (3, 3)


def test_an_evaluation_compares_zero_shot(exported: Path, teacher: Path, classes: Path, labeled: Path) -> None:
    out = exported.parent / "evaluated"
    models = [f"model={exported}", f"teacher={teacher}", sets_of(labeled, classes)]
    ended = d2v("evaluate", *models, "probes=[zero_shot]", "ks=[1,3]", f"out={out}")
    assert "Zero-shot classification of test by text embeddings of the classes on four, projected_cls" in ended.stdout
    rows = json.loads((out / "evaluation.json").read_text())["results"]
    zero_shot = {(row["candidate"], row["k"]): row for row in rows if row["measure"] == "zero_shot"}
    assert zero_shot.keys() == {(name, k) for name in ("untrained student", "student", "teacher") for k in (1, 3)}
    assert all(row["embedding"] == "projected_cls" and row["low"] <= row["value"] for row in zero_shot.values())


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
    aligned = computed_by_timm_alone(tmp_path, "aligned", pixels)
    assert_close(aligned, student.embed(pixels, representation="projected"))
    succeed("export", out, tmp_path / "student.onnx", *PROJECTED)
    ended = d2v("evaluate", f"model={out}", f"teacher={teacher}", sets_of(labeled, classes), "probes=[zero_shot]")
    assert "zero-shot top-1" in ended.stdout, ended.stderr


def test_a_narrower_student_learns_a_projection(teacher: Path, small_data: Path, tmp_path: Path) -> None:
    """A checkpoint holds it, and two ranks train as one process."""
    changes = ["student.embed_dim=16", "objectives.tokens.weight=0"]
    run_training(*arguments(tmp_path / "run", small_data, teacher, *changes))
    assert "student.projection.linear.weight" in student_of(tmp_path / "run")
    run_ranks(*train_command(arguments(tmp_path / "ranks", small_data, teacher, *changes))[1:])
    assert_same_losses(losses_of(tmp_path / "ranks"), losses_of(tmp_path / "run"), num_steps=4)


def test_a_map_to_another_embedding_is_not_compared_with_texts(
    exported: Path, classes: Path, labeled: Path, tmp_path: Path
) -> None:
    student, out = load_student(exported), tmp_path / "student.safetensors"
    student.provenance["alignment"] = {"target": "output_cls"}
    save_student(student, out)
    with pytest.raises(InputError, match="zero_shot needs the image embedding"):
        evaluate.main([f"model={out}", sets_of(labeled, classes), "probes=[zero_shot]"])


@pytest.mark.parametrize(
    ("shape", "change", "message"),
    [
        ((4, 64), "", "class_embeddings of a data set, with 128 columns; got 64"),
        ((3, 128), "", "classes.npy: expected finite numbers, a row for each of 4 classes, got (3, 128)"),
        (None, "", "classes.npy cannot be read: No such file or directory"),
        (
            (4, 128),
            "objectives.embedding.weight=0 alignment.max_samples=0",
            "probes: zero_shot needs the image embedding as projected_cls",
        ),
        (
            (4, 64),
            "objectives.embedding.weight=0 alignment.pooling=mean",
            "probes: zero_shot needs the image embedding as projected_cls",
        ),
        (
            (4, 128),
            "objectives.tokens.weight=0 objectives.embedding.weight=0",
            "objectives.tokens.weight: must be",
        ),
        (
            (4, 128),
            "retrieval.datasets.four.class_embeddings=null",
            "with 128 columns; got none",
        ),
    ],
)
def test_what_cannot_be(
    teacher: Path,
    small_data: Path,
    labeled: Path,
    tmp_path: Path,
    shape: tuple[int, int] | None,
    change: str,
    message: str,
) -> None:
    classes = tmp_path / "classes.npy"
    if shape is not None:
        np.save(classes, np.ones(shape))
    changes = [f"retrieval.{sets_of(labeled, classes)}", "retrieval.probes=[zero_shot]", *change.split()]
    command = train_command(arguments(tmp_path / "run", small_data, teacher, *changes))
    assert message in failure(run_command(*command), 2)
    assert not (tmp_path / "run" / "run.yaml").exists()
