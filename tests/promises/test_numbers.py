"""Promise 23: retrieval, kNN and the linear probe are those of a brute force in float64 and of scikit-learn.

What is compared is of the same data, teacher and settings, or is left out with a line that says why.
"""

import io
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from streaming import StreamingDataset
from torch.nn.functional import avg_pool2d

from d2v_composer import knn_accuracy, linear_probe_accuracy, load_teacher, retrieval_accuracy
from helpers import (
    GOLDEN,
    QUICKSTART,
    d2v,
    datasets_of,
    encoded_image,
    failure,
    log_of,
    run_training,
    saved,
    small_run,
    succeed,
    write_files,
    write_mds,
)

Embedded = tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]


def read_cifar(split: str, num: int) -> tuple[list[Any], torch.Tensor, NDArray[np.int64]]:
    """Return encoded images, their pixels, (N, 3, 32, 32) uint8, and their labels."""
    dataset: Any = StreamingDataset(local=str(QUICKSTART / "cifar10" / split), shuffle=False, batch_size=1)
    samples = [dataset[i] for i in range(num)]
    images, labels = [sample["image"] for sample in samples], [int(sample["label"]) for sample in samples]
    return images, torch.stack([decoded(image) for image in images]), np.array(labels)


def decoded(encoded: Any) -> torch.Tensor:
    image = Image.open(io.BytesIO(encoded)) if isinstance(encoded, bytes) else encoded
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.fixture(scope="module")
def embedded() -> Embedded:
    """The pixels of CIFAR-10 images in 16 × 16 blocks of averages and their labels: bank and queries."""
    (_, bank, bank_labels), (_, queries, query_labels) = (read_cifar(split, 800) for split in ("train", "test"))
    means = [avg_pool2d(images.double() / 255, 4).flatten(1).numpy() for images in (bank, queries)]
    return means[0], bank_labels, means[1], query_labels


def similarities(embedded: Embedded) -> NDArray[np.float64]:
    """Cosines of queries and bank in float64, (queries, bank)."""
    bank, _, queries, _ = embedded
    return (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ (
        bank / np.linalg.norm(bank, axis=1, keepdims=True)
    ).T


def tensors(embedded: Sequence[NDArray[Any]]) -> list[torch.Tensor]:
    return [
        torch.from_numpy(array).float() if i % 2 == 0 else torch.from_numpy(array) for i, array in enumerate(embedded)
    ]


def test_retrieval_is_a_brute_force(embedded: Embedded) -> None:
    """Promise 23: accuracy is the share of queries with one of their label among the k nearest."""
    _, bank_labels, _, query_labels = embedded
    nearest = np.argsort(-similarities(embedded), axis=1, kind="stable")
    accuracies = retrieval_accuracy(*tensors(embedded), ks=(1, 3, 10))  # pyright: ignore
    for k, accuracy in accuracies.items():
        hits = (bank_labels[nearest[:, :k]] == query_labels[:, None]).any(axis=1)
        assert accuracy == pytest.approx(hits.mean(), abs=1.1 / len(hits)), k  # one tie


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (5, 0.5)])
def test_knn_is_a_brute_force(embedded: Embedded, k: int, temperature: float) -> None:
    """Promise 23: each of the k nearest votes with exp(cosine / temperature)."""
    _, bank_labels, _, query_labels = embedded
    cosines = similarities(embedded)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    votes = np.zeros((len(query_labels), bank_labels.max() + 1))
    weights = np.exp(np.take_along_axis(cosines, nearest, axis=1) / temperature)
    np.add.at(votes, (np.arange(len(votes))[:, None], bank_labels[nearest]), weights)
    expected = (votes.argmax(axis=1) == query_labels).mean()
    accuracy = knn_accuracy(*tensors(embedded), k=k, temperature=temperature)  # pyright: ignore
    assert accuracy == pytest.approx(expected, abs=1.1 / len(query_labels))


def test_the_linear_probe_is_scikit_learns(embedded: Embedded) -> None:
    """Promise 23: they agree to 0.3 points, at a strength near ours that is best for scikit-learn on the queries."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    bank, bank_labels, queries, query_labels = fewer = [array[:400] for array in embedded]
    strength = 1e-2
    ours = linear_probe_accuracy(*tensors(fewer), strength=strength)  # pyright: ignore
    scaler = StandardScaler().fit(bank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LogisticRegression(C=1 / (strength * len(bank)), max_iter=2000, tol=1e-6)
        theirs = model.fit(scaler.transform(bank), bank_labels).score(scaler.transform(queries), query_labels)
    assert float(getattr(ours, "accuracy", ours)) == pytest.approx(theirs, abs=0.003)


def test_an_evaluation_measures_what_a_brute_force_does(tmp_path: Path) -> None:
    """Promise 23: d2v evaluate's accuracies of a teacher are those of its embeddings here, in float64."""
    teacher, parts = load_teacher(GOLDEN / "tiny_base.pt"), []
    for split, num in (("train", 200), ("test", 100)):
        images, pixels, labels = read_cifar(split, num)
        write_mds(tmp_path / split, images, labels.tolist())
        with torch.inference_mode():
            parts += [teacher.embed(pixels).double().numpy(), labels]
    succeed("evaluate", f"model={GOLDEN / 'tiny_base.pt'}", datasets_of(tmp_path), "ks=[1]", f"out={tmp_path}")
    values = list(numbers(json.loads((tmp_path / "evaluation.json").read_text())))
    for bank, queries in ((0, 2), (2, 0)):
        nearest = similarities((parts[bank], parts[bank + 1], parts[queries], parts[queries + 1])).argmax(axis=1)
        accuracy = (parts[bank + 1][nearest] == parts[queries + 1]).mean()
        assert 0.05 < accuracy < 0.5
        assert any(number == pytest.approx(accuracy) for number in values), accuracy


def numbers(value: Any) -> Iterator[float]:
    """Yield all numbers in what JSON holds."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)
    elif isinstance(value, float):
        yield value


@pytest.fixture(scope="module")
def of_teacher_blocks(tmp_path_factory: pytest.TempPathFactory, small_data: Path, labeled: Path) -> Path:
    """The folder of a run whose student began as its teacher's blocks, measured before its first batch."""
    folder = tmp_path_factory.mktemp("copied") / "run"
    sets = f"retrieval.{datasets_of(labeled)}"
    changes = "student.init=teacher_blocks", "student.mlp_ratio=4", "student.depth=2", "retrieval.at_start=true"
    run_training(*small_run(folder, small_data, sets, *changes, "max_duration=2ba", "scheduler.t_warmup=1ba"))
    return folder


@pytest.fixture(scope="module")
def exported(of_teacher_blocks: Path) -> Path:
    """The exported file of that run's student."""
    student = of_teacher_blocks.parent / "student.safetensors"
    succeed("export", of_teacher_blocks / "latest-rank0.pt", student)
    return student


def accuracies_of_untrained(folder: Path) -> dict[tuple[str, str], float]:
    """Return bank and embedding → the accuracy of the untrained student in an evaluation."""
    rows = json.loads((folder / "evaluation.json").read_text())["results"]
    return {(row["bank"], row["embedding"]): row["value"] for row in rows if row["candidate"] == "untrained student"}


NOT_MEASURED = (
    "the untrained student is not measured: its weights (init teacher_blocks) came from the teacher; set teacher=PATH\n"
)


def test_the_untrained_student_is_the_runs(
    of_teacher_blocks: Path, exported: Path, labeled: Path, tmp_path: Path
) -> None:
    """Promise 23: an evaluation gives it the numbers that the run measured before its first batch."""
    check_untrained(of_teacher_blocks, exported, labeled, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        ("seed=3",),
        ("student.embed_dim=24", "objectives.embedding.weight=1"),
        ("alignment.max_samples=0",),
        ("student.depth=5", "student.model=timm/test_byobnet"),
    ],
    ids=["fitted alignment", "trained alignment", "no alignment", "a timm model"],
)
def test_a_random_untrained_student_is_the_runs(
    changes: tuple[str, ...], small_data: Path, labeled: Path, tmp_path: Path
) -> None:
    """Promise 23: it has the run's random weights, and an alignment that is made as the run's was."""
    sets, few = f"retrieval.{datasets_of(labeled)}", ("max_duration=2ba", "scheduler.t_warmup=1ba")
    run_training(*small_run(tmp_path / "run", small_data, sets, "retrieval.at_start=true", *few, *changes))
    check_untrained(tmp_path / "run", tmp_path / "run" / "latest-rank0.pt", labeled, tmp_path)


def check_untrained(run: Path, student: Path, labeled: Path, out: Path) -> None:
    """Evaluate a run's student, and compare the untrained student's accuracies with those in the run's log."""
    models = f"model={student}", f"teacher={GOLDEN / 'tiny_base.pt'}"
    ended = succeed("evaluate", datasets_of(labeled), "ks=[1]", f"out={out}", *models)
    assert "not measured" not in ended.stderr
    accuracies, logged = accuracies_of_untrained(out), log_of(run)
    assert len(accuracies) == 2
    for (bank, embedding), accuracy in accuracies.items():
        assert embedding == "embedding"
        assert accuracy == pytest.approx(logged[f"metrics/small/bank_{bank}/top1"][0])


def test_without_its_teacher_the_untrained_student_is_not_measured(
    exported: Path, labeled: Path, tmp_path: Path
) -> None:
    """Promise 23: a line says why."""
    ended = succeed("evaluate", datasets_of(labeled), "ks=[1]", f"out={tmp_path}", f"model={exported}")
    assert NOT_MEASURED in ended.stderr
    assert accuracies_of_untrained(tmp_path) == {}


def test_a_finished_run_prints_its_table_again(small_data: Path, labeled: Path, tmp_path: Path) -> None:
    """Promises 10 and 23: rows and measures are those of the call that trained it, and the checkpoint does
    not change.
    """
    sets = f"retrieval.datasets={{small: {{format: mds, root: {labeled / 'test'}, label_column: null}}}}"
    few = "retrieval.at_start=true", "max_duration=2ba", "scheduler.t_warmup=1ba"
    arguments, checkpoint = small_run(tmp_path, small_data, sets, *few), tmp_path / "latest-rank0.pt"
    first, before = run_training(*arguments).stdout, checkpoint.read_bytes()
    again = run_training(*arguments).stdout
    assert f"{tmp_path}: this run is complete at 2ba" in again
    assert checkpoint.read_bytes() == before
    assert "neighbor agreement" in first
    assert first.partition("\n\n")[2] == again.partition("\n\n")[2]


def test_another_teacher_is_refused(of_teacher_blocks: Path, exported: Path, labeled: Path, tmp_path: Path) -> None:
    """Promise 23: an exported student and a checkpoint take their own teacher alone, which may be converted."""
    converted, other = (tmp_path / f"{name}.safetensors" for name in ("converted", "other"))
    succeed("convert-teacher", GOLDEN / "tiny_base.pt", converted, "--dtype", "float16")
    contents = torch.load(GOLDEN / "tiny_base.pt", weights_only=False)
    contents["model"]["blocks.1.mlp.fc2.weight"] *= 1.1  # not in the encoder
    torch.save(contents, tmp_path / "other.pt")
    succeed("convert-teacher", tmp_path / "other.pt", other)
    datasets = datasets_of(labeled)
    for model in (exported, of_teacher_blocks / "latest-rank0.pt"):
        line = failure(d2v("evaluate", datasets, f"model={model}", f"teacher={other}"), 2)
        problem = r"not this student's teacher: expected sha256 \w{64}, got \w{64}$"
        assert re.fullmatch(f"error: {other}: {problem}", line)
    ended = d2v("evaluate", datasets, f"model={exported}", f"teacher={converted}", "max_images=20")
    assert "teacher  " in ended.stdout, ended.stderr


def test_an_evaluation_replaces_only_its_own(labeled: Path, tmp_path: Path) -> None:
    """23 and 7: a user's file, or another model's results, are refused before the work, and stay."""
    datasets = datasets_of(labeled)
    command = "evaluate", datasets, "ks=[1]", "max_images=20", f"model={GOLDEN / 'tiny_base.pt'}"
    out = tmp_path / "out"
    out.mkdir()
    taken = [(f"evaluation.{suffix}", "mine") for suffix in ("csv", "json", "png")]
    for name, content in (*taken, ("evaluation.json", '{"a": 1}')):
        (out / name).write_text(content)
        ended = d2v(*command, f"out={out}")
        expected = f"error: out: {out / name} exists, but {out} has no results of the same model and weights; "
        expected += "remove the file, or choose another folder"
        assert (failure(ended, 2), "embedding" in ended.stdout) == (expected, False)
        assert [path.read_text() for path in out.iterdir()] == [content]
        (out / name).unlink()
    for changes in ([], ["probes=[knn]"]):  # the same model's
        succeed(*command, f"out={out}", *changes)
    before = (out / "evaluation.json").read_text()
    assert "knn" in before
    failure(d2v(*command, "weights=ema", f"out={out}"), 2)
    assert (out / "evaluation.json").read_text() == before


def test_test_images_among_the_train_images_are_counted(labeled: Path, small_data: Path, tmp_path: Path) -> None:
    """Promise 23: they make every model right; equal pixels count, also in different files."""
    said = "warning: small: {} of {} test images are also in its train split\n"
    model = f"model={GOLDEN / 'tiny_base.pt'}"
    run = small_run(tmp_path / "run", small_data, f"retrieval.{datasets_of(labeled)}", "max_duration=1ba")
    assert said.format(48, 48) in run_training(*run, "scheduler.t_warmup=0ba").stderr
    photos = {}
    for split, numbers, level in (("train", range(20), 1), ("test", range(18, 38), 9)):
        for number in numbers:
            image = Image.open(io.BytesIO(encoded_image(number)))
            photos[f"{split}/{number % 2}/{split}{number}.png"] = saved(image, "PNG", compress_level=level)
    folder = write_files(tmp_path / "photos", photos)
    sets = f"datasets={{small: {{format: folder, root: {folder}}}}}"
    assert said.format(2, 20) in succeed("evaluate", model, sets, "ks=[1]").stderr
    ended = succeed("evaluate", model, datasets_of(QUICKSTART / "cifar10"), "max_images=50")
    assert "also in its train split" not in ended.stderr
