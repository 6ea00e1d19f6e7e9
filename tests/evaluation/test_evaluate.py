"""d2v evaluate: accuracies with their intervals, for every kind of model file; the teacher gap closed over a run."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import simplejpeg
import torch

from d2v_composer import (
    knn_accuracy,
    linear_probe_accuracy,
    load_teacher,
    neighbor_agreement,
    retrieval_accuracy,
)
from d2v_composer.checkpoints.load import save_student
from d2v_composer.commands import evaluate as evaluate_command
from d2v_composer.config.reference import load_any
from d2v_composer.evaluation import speed
from d2v_composer.evaluation.metrics.retrieval import retrieval_from
from d2v_composer.evaluation.results import Result, accuracy_interval, gap_closed, gap_closed_by_step
from d2v_composer.evaluation.rows import GAP, metric_key
from d2v_composer.models.alignment import EmbeddingInfo
from d2v_composer.models.encoder import Encoder
from d2v_composer.models.timm_network import TimmStudent
from d2v_composer.sources.labeled import load_labeled_set
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, QUICKSTART, ROOT, datasets_of, write_images, write_mds

YAML = ROOT / "yamls" / "evaluate.yaml"
TEACHER = QUICKSTART / "teacher.safetensors"
LATEST = "latest-rank0.pt"
DATASETS = datasets_of(QUICKSTART / "cifar10")


class Evaluated(NamedTuple):
    """A model's evaluation: what it printed, its JSON, and the rows of its CSV."""

    printed: str
    report: dict[str, Any]
    rows: list[dict[str, str]]


def evaluate(out: Path, model: Path, *options: str) -> Evaluated:
    printed = io.StringIO()
    with redirect_stdout(printed):
        evaluate_command.main([str(YAML), DATASETS, "max_images=60", f"model={model}", f"out={out}", *options])
    rows = list(csv.DictReader((out / "evaluation.csv").read_text().splitlines()))
    return Evaluated(printed.getvalue(), json.loads((out / "evaluation.json").read_text()), rows)


@pytest.fixture(scope="module")
def of_a_checkpoint(uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    probes = "probes=[knn,linear,agreement,instance]"
    options = probes, "embeddings=all", "baselines=[pixels, encoder, teacher]"
    return evaluate(tmp_path_factory.mktemp("checkpoint"), uninterrupted / LATEST, *options)


@pytest.mark.slow
def test_the_students_numbers_are_those_of_its_embeddings(of_a_checkpoint: Evaluated, uninterrupted: Path) -> None:
    printed, rows, (student, _) = of_a_checkpoint.printed, of_a_checkpoint.rows, load_any(uninterrupted / LATEST)
    labeled = load_labeled_set("mds", QUICKSTART / "cifar10", image_size=32, max_images=60)
    with torch.inference_mode():
        bank, queries = (student.embed(images.samples) for images in labeled[:2])
        theirs = load_teacher(GOLDEN / "tiny_base.pt").embed(labeled.test.samples)
    sets = bank, labeled.train.labels, queries, labeled.test.labels
    values = {
        (row["candidate"], row["bank"], row["measure"], row["k"]): float(row["value"])
        for row in rows
        if row["embedding"] == "embedding"
    }
    for k, accuracy in retrieval_accuracy(*sets).items():
        assert values["student", "train", "retrieval", str(k)] == pytest.approx(accuracy)
        assert f"{100 * accuracy:.1f} [" in printed
    assert values["student", "train", "knn", "20"] == knn_accuracy(*sets)
    assert values["student", "train", "linear", ""] == linear_probe_accuracy(*sets)
    assert values["student", "", "agreement", "10"] == pytest.approx(neighbor_agreement(queries, theirs))
    assert values["teacher", "", "agreement", "10"] == 1
    assert all(0 <= float(row["low"]) <= float(row["value"]) <= float(row["high"]) <= 1 for row in rows)
    assert printed.startswith("embedding: output_cls, 48 channels, ")
    assert "Classification of the test samples by probes fitted to the train samples on small" in printed


@pytest.mark.slow
def test_every_model_and_embedding_has_its_rows(of_a_checkpoint: Evaluated) -> None:
    names = [candidate["name"] for candidate in of_a_checkpoint.report["candidates"]]
    assert names == ["pixels", "encoder", "untrained student", "student", "teacher"]
    embeddings = {"pixels": 1, "encoder": 3, "untrained student": 7, "student": 7, "teacher": 7}
    embeddings["in the teacher's index"] = 1
    retrievals, probes, without_labels = 2 * 2, 3, 3  # two banks, two k
    rows = Counter(row["candidate"] for row in of_a_checkpoint.report["results"])
    assert rows == {name: (retrievals + probes + without_labels) * count for name, count in embeddings.items()}


def test_agreement_needs_a_teacher(rivals: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="probes: agreement needs the teacher; set teacher=PATH"):
        evaluate(tmp_path, rivals["layer_mean"], "probes=[agreement]")


@pytest.fixture(scope="module")
def rivals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student with another layer_mean than its teacher, and one that takes larger images."""
    folder, teacher = tmp_path_factory.mktemp("rivals"), load_teacher(GOLDEN / "tiny_base.pt")
    network = teacher.build_student(model="timm/test_byobnet").config.changed(image_size=64, interpolation="bilinear")
    students = {"layer_mean": teacher.build_student(depth=1, normalization="layer"), "output": TimmStudent(network)}
    for name, student in students.items():
        save_student(student, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in students}


class Compared(NamedTuple):
    """Evaluations of two students, and of a teacher with them as rivals."""

    tables: dict[str, Any]
    timed: list[tuple[str, int]]
    """Each batch whose encoding is timed: the model, and the batch's size."""


@pytest.fixture(scope="module")
def evaluated(rivals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Compared:
    folder, timed = tmp_path_factory.mktemp("evaluated"), list[tuple[str, int]]()
    noise = np.random.default_rng(0).integers(0, 256, (80, 96, 96, 3), dtype=np.uint8)
    images = [simplejpeg.encode_jpeg(pixels) for pixels in noise]
    for split, chosen in {"train": images[:40], "test": images[40:]}.items():
        write_mds(folder / split, chosen, [i % 3 for i in range(40)])

    def measure(passes: dict[str, tuple[Callable[[], object], int]], repeats: int) -> dict[str, np.ndarray]:
        forward, sizes = Encoder.__call__, list[int]()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Encoder, "__call__", lambda *args: sizes.append(len(args[1].values)) or forward(*args))
            for name, (work, _) in passes.items():
                sizes.clear()
                work()
                timed.extend((name, size) for size in sizes)
        return {name: np.ones(repeats) for name in passes}

    tables = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "interleave", measure)
        for name, model in {**rivals, "rivals": GOLDEN / "tiny_base.pt"}.items():
            options = [f"rivals=[{','.join(map(str, rivals.values()))}]"] if name == "rivals" else []
            sets, out = f"datasets={{noise: {{format: mds, root: {folder}}}}}", folder / name
            evaluate_command.main(
                [f"model={model}", sets, "probes=[instance]", "embeddings=all", f"out={out}", *options]
            )
            tables[name] = json.loads((out / "evaluation.json").read_text())["results"]
    return Compared(tables, timed)


@pytest.mark.parametrize("name", ["layer_mean", "output"])
def test_a_rival_has_the_numbers_of_its_own_evaluation(name: str, rivals: dict[str, Path], evaluated: Compared) -> None:
    """It sees images of its own size, and computes layer_mean in its own way."""

    def numbers(of: str, row: str) -> dict[tuple[str, ...], float]:
        entries = [entry for entry in evaluated.tables[of] if entry["candidate"] == row]
        chosen = [entry for entry in entries if entry["embedding"].startswith(name)]
        return {tuple(entry[key] for key in ("embedding", "bank", "measure", "k")): entry["value"] for entry in chosen}

    ours = numbers("rivals", str(rivals[name]))
    poolings, measures, ks = 3, 2 + 1, 2  # two banks, and instances
    assert len(ours) == poolings * measures * ks
    assert ours == numbers(name, "student")


@pytest.mark.parametrize("places", ["pixels", "encoder", "teacher gap closed", "a.pt, a.pt"])
def test_a_rival_has_a_row_of_its_own(places: str) -> None:
    problem = "is listed more than once$" if "," in places else rf"is the name of another row; .*as \./{places}$"
    with pytest.raises(InputError, match=rf"^rivals: '[\w .]+' {problem}"):
        evaluate_command.main([str(YAML), f"model={GOLDEN / 'tiny_base.pt'}", f"rivals=[{places}]"])


def test_speed_is_of_the_batches_that_it_names(evaluated: Compared, rivals: dict[str, Path]) -> None:
    """Each model encodes one batch of each size by itself, although several have the same encoder."""
    models = ["untrained student", "teacher", *map(str, rivals.values())]
    assert sorted(evaluated.timed) == sorted(product(models, [1, 64]))


def test_a_teacher_is_compared_with_an_untrained_student(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_command.main([str(YAML), f"model={TEACHER}", DATASETS, "max_images=8", "precision=amp_bf16"])
    printed = capsys.readouterr().out
    first, *lines = printed.splitlines()
    assert first == "embedding: output_mean, 192 channels, the teacher's own"
    assert lines[0] == "Zero-shot retrieval on small, embedding: the teacher's output_mean"
    assert lines[1].startswith("in % [95 % interval]  ")
    rows = [re.match(r"\D+?(?= +\d)", line) for line in lines[2:5]]
    assert [row and row[0] for row in rows] == ["pixels", "untrained student (raw)", "teacher"]
    assert "gap closed" not in printed


def test_images_without_labels_are_judged_without(uninterrupted: Path, tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", [f"{number}.jpg" for number in range(12)])
    sets = f"datasets={{photos: {{format: folder, root: {photos}}}}}"
    judged = evaluate(tmp_path, uninterrupted / LATEST, sets, "probes=[knn]")
    assert "Measured without labels on photos, embedding: the teacher's output_cls\n" in (judged.printed)
    table = re.sub(" {2,}", "  ", judged.printed)
    assert "neighbor agreement  instance top-1  instance top-3" in table
    assert "\nteacher  100.0 [100.0, 100.0] " in table
    assert "\nteacher gap closed  " in table
    measures = {(row["bank"], row["measure"], row["k"]) for row in judged.report["results"]}
    assert measures == {("", "agreement", 10), ("", "instance", 1), ("", "instance", 3)}
    assert judged.report["class_names"] == {"photos": []}
    page = (tmp_path / "evaluation.html").read_text()
    assert "What the student finds in photos" in page
    assert "<td>teacher</td>" in page
    assert page.count("<img src=") == 12 * (1 + 3 + 3)


def test_more_neighbors_than_images_are_refused() -> None:
    problem = r"^ks: must be from 1 to 2000, the number of samples in cifar10's smallest split"
    with pytest.raises(InputError, match=problem):
        evaluate_command.main([str(YAML), f"model={GOLDEN / 'tiny_base.pt'}", "ks=[1,5000]"])


def test_an_accuracys_interval_is_that_of_a_binomial() -> None:
    interval = accuracy_interval(np.arange(1000) % 4 == 0)
    half_width = 1.96 * np.sqrt(0.25 * 0.75 / 1000)
    assert interval.value == 0.25
    assert [interval.low, interval.high] == pytest.approx([0.25 - half_width, 0.25 + half_width], abs=0.003)


def test_the_gap_closed_is_paired_by_query() -> None:
    rng = np.random.default_rng(0)
    untrained, teacher = rng.random(2000) < 0.3, rng.random(2000) < 0.5
    half = np.where(np.arange(2000) % 2 == 0, teacher, untrained)

    def closed(*hits: np.ndarray) -> Any:
        info, column = EmbeddingInfo("output_cls", "raw", 8, ""), retrieval_from("train", 1)
        cells = {
            row: Result(row, "set", column, "output_cls", info, True, torch.from_numpy(hit))
            for row, hit in zip(GAP, hits, strict=True)
        }
        return gap_closed(cells)

    assert closed(untrained, teacher, teacher).interval == (1, 1, 1)
    assert closed(untrained, untrained, teacher).interval == (0, 0, 0)
    assert closed(teacher, half, untrained) == (None, 0)
    share = closed(untrained, half, teacher).interval
    assert share.low < 0.5 < share.high < share.low + 0.3


def log_of(student: dict[str, dict[int, float]], teacher: dict[str, float]) -> dict[str, dict[int, float]]:
    measures = {bank: retrieval_from(bank, 1) for bank in student}
    log = {metric_key("cifar10", measures[bank]): values for bank, values in student.items()}
    return log | {metric_key("cifar10", measures[bank], row="teacher"): {0: value} for bank, value in teacher.items()}


STUDENT = {"train": {0: 0.2, 10: 0.3}, "test": {0: 0.1, 10: 0.2}}


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (STUDENT, {"train": 0.4, "test": 0.5}, {0: 0, 10: (0.5 + 0.25) / 2}),  # the mean of both banks
        (STUDENT, {"train": 0.4, "test": 0.1}, {0: 0, 10: 0.5}),  # no gap with one bank
        (STUDENT, {"train": 0.2, "test": 0.1}, {}),  # no gap
        (STUDENT, {}, {}),  # no teacher
        ({"train": {10: 0.3}, "test": {10: 0.2}}, {"train": 0.4, "test": 0.5}, {}),  # no untrained student
    ],
)
def test_the_gap_closed_over_a_run(
    student: dict[str, dict[int, float]], teacher: dict[str, float], expected: dict[int, float]
) -> None:
    assert gap_closed_by_step(log_of(student, teacher), "cifar10") == pytest.approx(expected)
    if student is STUDENT:  # the baselines may be another run's
        log, baselines = log_of({bank: {10: top1[10]} for bank, top1 in student.items()}, {}), log_of(student, teacher)
        later = {step: value for step, value in expected.items() if step}
        assert gap_closed_by_step(log, "cifar10", baselines=baselines) == pytest.approx(later)
