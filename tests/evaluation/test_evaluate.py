"""d2v evaluate: accuracies with their intervals, for every kind of model file."""

import contextlib
import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.io import write_png

from d2v_composer import (
    knn_accuracy,
    linear_probe_accuracy,
    load_student,
    load_teacher,
    retrieval_accuracy,
)
from d2v_composer.commands import evaluate as evaluate_recipe
from d2v_composer.commands import export as export_student
from d2v_composer.data.labeled import LabeledImages, LabeledSet, load_labeled_set
from d2v_composer.evaluation.evaluate import (
    Candidate,
    Evaluation,
    accuracy_interval,
    confusion_matrix,
    evaluate,
    gap_closed_interval,
)
from d2v_composer.report.tables import evaluation_tables
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, QUICKSTART, ROOT

YAML = ROOT / "yamls" / "evaluate.yaml"


def run_evaluate(*overrides: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluate_recipe.main([str(YAML), *overrides])
    return printed.getvalue()


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred of the quickstart's images as files: root/{train,test}/CLASS/*.png."""
    root = tmp_path_factory.mktemp("small_set")
    cifar10 = load_labeled_set("mds", QUICKSTART / "cifar10", image_size=32, interpolation="bicubic")
    for name, count in (("train", 60), ("test", 40)):
        images, labels = getattr(cifar10, name)
        for i in range(count):
            folder = root / name / str(int(labels[i]))
            folder.mkdir(parents=True, exist_ok=True)
            write_png(images[i], str(folder / f"{i}.png"))
        for label in range(10):  # each class in both
            (root / name / str(label)).mkdir(exist_ok=True)
    return root


def name_of(row: dict[str, str]) -> tuple[str, ...]:
    return row["candidate"], row["embedding"], row["measure"]


def datasets(root: Path) -> str:
    return f"datasets={{small: {{format: folder, root: {root}}}}}"


def test_a_checkpoint_and_its_exported_student_give_the_same_numbers(
    uninterrupted: Path, small_set: Path, tmp_path: Path
) -> None:
    checkpoint, student = uninterrupted / "latest-rank0.pt", tmp_path / "student.safetensors"
    export_student.main([str(checkpoint), str(student)])
    from_checkpoint, from_student = tmp_path / "checkpoint", tmp_path / "student"
    probes = "probes=[knn, linear]"
    printed = run_evaluate(f"model={checkpoint}", datasets(small_set), f"out={from_checkpoint}", probes)
    chosen = run_evaluate(f"model={student}", datasets(small_set), f"out={from_student}", "pooling=mean")
    assert printed.startswith(
        "embedding: layer_mean_cls (the primary embedding of the model's run)\nZero-shot retrieval on "
    )
    assert chosen.startswith(
        "embedding: layer_mean_mean (the primary embedding of the model's run, but pooling as asked)\n"
    )

    found = {folder: json.loads((folder / "evaluation.json").read_text()) for folder in (from_checkpoint, from_student)}
    names = [candidate["name"] for candidate in found[from_checkpoint]["candidates"]]
    assert names == ["pixels", "encoder", "untrained student", "student", "teacher"]
    assert [candidate["name"] for candidate in found[from_student]["candidates"]] == names[:-1]  # without a teacher

    def accuracies(folder: Path) -> dict[tuple, tuple]:
        return {
            tuple(row[key] for key in ("candidate", "dataset", "bank", "embedding", "k")): (row["value"], row["low"])
            for row in found[folder]["results"]
            if row["candidate"] != "teacher" and row["measure"] == "retrieval"
        }

    assert accuracies(from_checkpoint) == accuracies(from_student)
    assert [each["primary"] for each in found.values()] == ["layer_mean_cls", "layer_mean_mean"]
    assert found[from_student]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found[from_student]["machine"]["cores"] >= 1

    # The student's numbers are those of its own embeddings.
    sizes = load_student(student).encoder.config
    labeled = load_labeled_set("folder", small_set, image_size=sizes.image_size, interpolation=sizes.interpolation)
    with torch.inference_mode():
        bank, queries = (
            load_student(student).embed(images.images, representation="layer_mean") for images in labeled[:2]
        )
    expected = retrieval_accuracy(bank, labeled.train.labels, queries, labeled.test.labels)
    for k in (1, 3):
        assert accuracies(from_checkpoint)["student", "small", "train", "layer_mean_cls", k][0] == pytest.approx(
            expected[k]
        )
        assert f"{100 * expected[k]:.1f} [" in printed

    with (from_checkpoint / "evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found[from_checkpoint]["results"]) == (2 * 2 + 3) * (1 + 3 + 6 + 6 + 6)
    for row in rows:
        assert 0 <= float(row["low"]) <= float(row["value"]) <= float(row["high"]) <= 1
    [by_vote] = [row for row in rows if name_of(row) == ("student", "layer_mean_cls", "knn")]
    sets = bank, labeled.train.labels, queries, labeled.test.labels
    assert (by_vote["bank"], by_vote["k"], by_vote["strength"]) == ("train", "20", "")
    assert float(by_vote["value"]) == knn_accuracy(*sets)
    [by_line] = [row for row in rows if name_of(row) == ("student", "layer_mean_cls", "linear")]
    assert float(by_line["value"]) == linear_probe_accuracy(*sets, strength=float(by_line["strength"]))
    [table] = [
        part for part in printed.split("\n\n") if part.startswith("Probes fitted to train, judged on test on small")
    ]
    head, *lines = table.splitlines()[1:]
    assert re.split(r"  +", head.strip()) == ["20-NN weighted", "20-NN majority", "linear probe", "L2 strength"]
    assert [re.match(r"\D+?(?= +\d)", line) is not None for line in lines[:5]] == [True] * 5
    assert f"{100 * float(by_line['value']):.1f} [" in lines[3]
    assert lines[3].endswith(f" {float(by_line['strength']):g}")
    for entry in found[from_checkpoint]["confusion"]:
        matrix = np.array(entry["matrix"])
        assert matrix.sum() == (40 if entry["bank"] == "train" else 60)
    probed = {("train", "knn"), ("train", "knn_majority"), ("train", "linear")}
    for share in found[from_checkpoint]["teacher_gap_closed"]:
        assert (share["bank"], share["measure"]) in {*probed, ("train", "retrieval"), ("test", "retrieval")}


def test_a_teacher_is_compared_with_an_untrained_student(small_set: Path) -> None:
    printed = run_evaluate(
        f"model={QUICKSTART / 'teacher.safetensors'}", datasets(small_set), "max_images=8", "precision=amp_bf16"
    )
    first, *lines = printed.splitlines()
    assert first == "embedding: output_cls (the default, since the file has no run's record)"
    assert lines[0] == "Zero-shot retrieval on small, output_cls, accuracy in % [95 % interval]"
    rows = [re.match(r"\D+?(?= +\d)", line) for line in lines[2:6]]
    assert [row and row[0] for row in rows] == ["pixels", "encoder", "untrained student", "teacher"]
    assert "gap closed" not in printed
    teacher = load_teacher(QUICKSTART / "teacher.safetensors")
    size = sum(parameter.numel() for parameter in teacher.parameters())
    [costs] = [line for line in lines[7:] if line.startswith("teacher ")][-1:]
    assert costs.split()[1] == f"{size / 1e6:.2f}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "model: is required"),
        (["model=nowhere.pt"], "nowhere.pt: no such file"),
        ([f"model={ROOT / 'README.md'}"], "README.md: truncated, or not a PyTorch checkpoint"),
        (
            [f"model={GOLDEN / 'tiny_base.pt'}", "ks=[1,5000]"],
            "ks: must be at most 2000, the images of cifar10's smaller set",
        ),
        (
            [f"model={GOLDEN / 'tiny_base.pt'}", f"out={ROOT / 'README.md'}"],
            "README.md: Not a directory",
        ),
        (
            [f"model={GOLDEN / 'tiny_base.pt'}", "probes=[knn, liner]"],
            "probes[1]: must be 'knn' or 'linear', got 'liner'",
        ),
        ([f"model={GOLDEN / 'tiny_base.pt'}", "datasets={}"], "datasets: must have at least one data set"),
    ],
)
def test_refuses_bad_arguments(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        evaluate_recipe.main([str(YAML), *overrides])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def labels_as_embeddings(images: Tensor) -> dict[str, Tensor]:
    return {"output_cls": torch.eye(3)[images[:, 0, 0, 0].long()]}


def test_confusion_matrix_and_class_accuracies() -> None:
    """The embedding of an image is its first pixel."""

    def numbered(numbers: list[int], labels: list[int]) -> LabeledImages:
        images = torch.tensor(numbers, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
        return LabeledImages(images, torch.tensor(labels))

    labeled = LabeledSet(numbered([0, 1, 2], [0, 1, 2]), numbered([0, 0, 1, 2, 2], [0, 1, 1, 2, 0]))
    candidates = [Candidate("student", labels_as_embeddings, 1_000_000, 2.0)]
    retrievals = list(evaluate(candidates, {"set": labeled}, [1], "cpu", batch_size=2))
    assert retrievals[0].bank == "train"
    assert retrievals[0].confusion.tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 1]]
    assert retrievals[0].class_accuracy.tolist() == [0.5, 0.5, 1.0]
    assert retrievals[0].accuracy(1).value == 0.6
    table = evaluation_tables(Evaluation(candidates, retrievals, [1], "output_cls", {"set": ["cat", "dog"]}))
    rows = [line.split() for line in table.partition("confused with\n")[2].partition("confused with\n")[2].splitlines()]
    assert rows[:3] == [["cat", "50.0", "2"], ["dog", "50.0", "cat"], ["2", "100.0", "–"]]  # a label without a name
    assert confusion_matrix(torch.tensor([1]), torch.tensor([0])).tolist() == [[0, 0], [1, 0]]


def test_an_accuracys_interval_is_that_of_a_binomial() -> None:
    hits = np.arange(1000) % 4 == 0
    interval = accuracy_interval(hits)
    half_width = 1.96 * np.sqrt(0.25 * 0.75 / 1000)
    assert interval.value == 0.25
    assert [interval.low, interval.high] == pytest.approx([0.25 - half_width, 0.25 + half_width], abs=0.003)


def test_the_gap_closed_is_paired_by_query() -> None:
    rng = np.random.default_rng(0)
    untrained, teacher = rng.random(2000) < 0.3, rng.random(2000) < 0.5
    assert gap_closed_interval(untrained, teacher, teacher) == (1, 1, 1)
    assert gap_closed_interval(untrained, untrained, teacher) == (0, 0, 0)
    half = np.where(np.arange(2000) % 2 == 0, teacher, untrained)
    share = gap_closed_interval(untrained, half, teacher)
    assert share is not None
    assert share.low < 0.5 < share.high
    assert share.high - share.low < 0.3
    assert gap_closed_interval(teacher, half, untrained) is None
