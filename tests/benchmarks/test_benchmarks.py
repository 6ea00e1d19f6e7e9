"""Benchmarks: their rows and ratios, and that all contenders do the same work; never how fast it is."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from d2v_composer.benchmarks.data import Photos
from d2v_composer.benchmarks.measure import interleave, one_core, ratio
from d2v_composer.benchmarks.retrieval import check_neighbors
from d2v_composer.benchmarks.step import build_equal_model, build_sized_model, check_losses
from d2v_composer.commands import benchmark
from d2v_composer.models.encoder import height_and_width
from d2v_composer.system.errors import InputError
from gated_store import GatedStore
from helpers import encoded_image

STEP = ["step", "--batch-size", "2", "--precision", "amp_bf16"]


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Run a benchmark with one repeat, and return its JSON."""
    report = tmp_path / "report.json"
    benchmark.main([*arguments, "--repeats", "1", "--json", str(report)])
    found = json.loads(report.read_text())
    assert found["rows"][0]["ratio_to_baseline"] == 1
    assert all(len(row["rates"]) == 1 and row["rates"][0] > 0 for row in found["rows"])
    return found


def names(found: dict[str, Any]) -> list[str]:
    return [row["name"] for row in found["rows"]]


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_data_beside_image_folder_and_litdata(
    workers: str, tmp_path: Path, object_store: GatedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    remote = f"{object_store.create_bucket(f'benchmark{workers}')}/images"
    found = run(tmp_path, "data", "--num-images", "32", "--workers", workers, "--remote", remote)
    contenders = ["ImageFolder + PIL", "litdata + PIL", "ours, local disk", "ours, 256-px shards", "ours, S3 warm"]
    assert names(found) == contenders
    rates = {row["name"]: row["rates"][0] for row in found["rows"]}
    assert {each["what"]: each["ratio"] for each in found["ratios"]} == {
        "local disk ÷ ImageFolder + PIL": pytest.approx(rates["ours, local disk"] / rates["ImageFolder + PIL"]),
        "S3 warm ÷ local disk": pytest.approx(rates["ours, S3 warm"] / rates["ours, local disk"]),
    }


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        (["--no-compile"], ["naive", "ours, eager"]),
        pytest.param([], ["naive", "ours, eager", "ours"], marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_step_beside_the_naive_program(
    options: list[str], rows: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It checks that they find the same loss."""
    found = run(tmp_path, *STEP, "--size", "quickstart", *options)
    assert names(found) == [*rows, "matrix product alone"]
    assert (found["precision"], found["device_batch_size"]) == ("amp_bf16", 2)
    rates = {row["name"]: row["rates"][0] for row in found["rows"]}
    assert found["ratios"][1]["ratio"] == pytest.approx(rates[rows[-1]] / rates["naive"])
    assert f"ours ÷ naive: {rates[rows[-1]] / rates['naive']:.2f}" in capsys.readouterr().out


@pytest.mark.usefixtures("one_thread")
def test_step_of_a_timm_teacher_beside_data2vec2_of_equal_sizes(tmp_path: Path) -> None:
    teacher = [*STEP, "--teacher", "timm/test_vit", "--no-compile", "--image-size"]
    found = run(tmp_path, *teacher, "48")
    assert names(found) == ["ours, data2vec 2.0 of equal sizes", "ours, eager", "matrix product alone"]
    assert found["ratios"][1]["what"] == "FLOP/s ÷ those of data2vec 2.0 of equal sizes"
    assert names(run(tmp_path, *teacher, "32x48")) == ["ours, eager", "matrix product alone"]  # not square


def test_data2vec2_of_equal_sizes_costs_the_same() -> None:
    for name in ("timm/test_vit", "timm/vit_tiny_patch16_224", "timm/eva02_tiny_patch14_224"):
        model = build_sized_model(name)
        equal = build_equal_model(model.teacher)
        assert equal is not None
        images = torch.zeros(1, 3, *height_and_width(model.teacher.config.image_size))
        assert equal.flops_per_batch(images) == pytest.approx(model.flops_per_batch(images), rel=0.02)


def test_contenders_that_find_another_loss_are_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"'ours' finds the loss 2.01, 'naive' 2.0"):
        check_losses({"naive": 2.0, "ours": 2.01})
    check_losses({"naive": 2.0, "ours": 2.001})


@pytest.mark.usefixtures("one_thread")
def test_retrieval_beside_the_matrix_product_and_faiss(tmp_path: Path) -> None:
    found = run(tmp_path, "retrieval", "--bank", "3000", "--queries", "200", "--dim", "64", "--k", "5")
    assert names(found) == ["matrix product alone", "ours", "faiss IndexFlatIP"]
    [[product], [ours], _] = [row["rates"] for row in found["rows"]]
    assert found["ratios"] == [
        {"what": "ours ÷ matrix product", "ratio": pytest.approx(ours / product), "at_least": 0.625}
    ]


def test_a_search_that_finds_other_neighbors_is_an_error() -> None:
    bank, queries = torch.randn(50, 8), torch.randn(6, 8)
    right = (normalize(queries, dim=1) @ normalize(bank, dim=1).T).topk(3).indices.numpy()
    wrong = right.copy()
    wrong[4, 1] = next(i for i in range(50) if i not in right[4])
    check_neighbors(bank, queries, {"ours": right, "theirs": right})
    with pytest.raises(RuntimeError, match="'theirs' finds other neighbors than 'ours'"):
        check_neighbors(bank, queries, {"ours": right, "theirs": wrong})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "--images", "absent"], "absent: no images"),
        (["step", "--no-compile", "--teacher", "base"], "--teacher: must be timm/NAME, got 'base'"),
        (["step", "--no-compile", "--image-size", "64"], "--image-size: needs --teacher timm/NAME"),
        (["step", "--device", "cuda"], "--device cuda: torch finds no GPU on this machine"),
        (["step", "--no-compile", "--precision", "amp_fp16"], "--precision amp_fp16: needs a GPU; a CPU has fp32 and"),
        (["retrieval", "--k", "21", "--bank", "20"], "--k: must be at most --bank 20, got 21"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError) as caught:
        benchmark.main(arguments)
    assert str(caught.value).startswith(message)


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_photos_have_imagenets_sizes(tmp_path: Path) -> None:
    files = Photos.make(tmp_path / "photos", 200).files
    sizes = np.array([size_of(path) for path in files])
    assert len(files) == 200
    assert sizes.mean(axis=0) == pytest.approx([452, 387], rel=0.03)
    assert np.mean([path.stat().st_size for path in files]) == pytest.approx(110_000, rel=0.1)


def test_photos_of_a_folder_are_rgb_jpegs(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "color.jpg").write_bytes(encoded_image(0))
    Image.fromarray(np.zeros((40, 30), np.uint8)).save(source / "gray.png")
    taken = Photos.take(source, tmp_path, 100).files
    assert {path.read_bytes() for path in taken} > {encoded_image(0)}
    for path in taken:
        with Image.open(path) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
    (source / "damaged.jpg").write_bytes(encoded_image(1)[:100])
    with pytest.raises(InputError, match=r"damaged\.jpg: cannot be read"):
        Photos.take(source, tmp_path, 100)


def test_interleaving_rotates_the_first_and_skips_the_warm_up() -> None:
    order: list[str] = []
    now = [0.0]

    def passing(name: str, seconds: list[float]) -> Callable[[], None]:
        def one_pass() -> None:
            order.append(name)
            now[0] += seconds.pop(0)

        return one_pass

    # The warm-up does not count; the second round is half as fast for both.
    passes = {"a": passing("a", [9, 1, 2, 1]), "b": passing("b", [9, 2, 4, 2])}
    rates = interleave(passes, 3, clock=lambda: now[0])
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert rates["a"].tolist() == [1, 0.5, 1]
    assert ratio(rates["b"], rates["a"]) == 0.5


def test_one_core_holds_all_threads() -> None:
    allowed = os.sched_getaffinity(0)
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        assert thread.native_id is not None
        with one_core():
            assert len(os.sched_getaffinity(0)) == 1
            assert os.sched_getaffinity(thread.native_id) == os.sched_getaffinity(0) <= allowed
        assert os.sched_getaffinity(thread.native_id) == os.sched_getaffinity(0) == allowed
    finally:
        end.set()
        thread.join()
