"""Benchmarks: rows, photographs, interleaving, one core; never how fast it is."""

import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from d2v_composer.benchmarks.data import FEWEST_IMAGES, make_photos, take_photos
from d2v_composer.benchmarks.measure import Rates, interleave, one_core
from d2v_composer.benchmarks.retrieval import check_neighbors
from d2v_composer.benchmarks.step import build_equal_model, build_sized_model, check_losses
from d2v_composer.commands import benchmark as benchmark_recipe
from d2v_composer.models.encoder import height_and_width
from d2v_composer.models.timm_teacher import TimmTeacher
from d2v_composer.system.errors import InputError
from helpers import encoded_image, run_command

COMMAND = ("-m", "d2v_composer.commands", "benchmark")

ORIGINALS, RESIZED = "originals", "256 px"
ROWS = [
    ("ImageFolder + PIL", ORIGINALS, "float32"),
    ("ImageFolder + PIL", ORIGINALS, "uint8"),
    ("litdata + PIL", ORIGINALS, "float32"),
    ("litdata + PIL", ORIGINALS, "uint8"),
    ("litdata + torchvision", ORIGINALS, "uint8"),
    ("webdataset + PIL", ORIGINALS, "float32"),
    ("webdataset + PIL", ORIGINALS, "uint8"),
    ("ours, local disk", ORIGINALS, "uint8"),
    ("ours, S3 warm", ORIGINALS, "uint8"),
    ("ours, S3 cold", ORIGINALS, "uint8"),
    ("ours, decoding alone", ORIGINALS, "uint8"),
    ("ours, local disk", RESIZED, "uint8"),
    ("ours, decoding alone", RESIZED, "uint8"),
    ("ours, S3 cold, mid-epoch", ORIGINALS, "uint8"),
    ("ours, S3 warm, mid-epoch", ORIGINALS, "uint8"),
]


@pytest.fixture
def benchmark() -> Callable[[Sequence[str]], Any]:
    """The command's main function."""
    return benchmark_recipe.main


@pytest.mark.slow
def test_data_rows_and_targets(tmp_path: Path) -> None:
    work, report = tmp_path / "work", tmp_path / "report.json"
    work.mkdir()
    command = [sys.executable, *COMMAND, "data", "--num-images", str(FEWEST_IMAGES), "--repeats", "1"]
    ended = run_command(*command, "--workers", "0", "2", "--work", work, "--json", report, timeout=400)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(report.read_text())

    assert [(row["name"], row["stored"], row["delivers"], row["workers"]) for row in found["rows"]] == [
        (*row, workers) for workers in (0, 2) for row in ROWS
    ]
    for row in found["rows"]:
        if is_installed(row["name"]):
            assert len(row["rates"]) == 1
            assert row["rates"][0] == row["median"] > 0
            assert row["ratio_to_baseline"] > 0
            printed = (
                rf"\n{re.escape(row['name'])} +[\d.]+ +[\d.]+ – [\d.]+ +[\d.]+ +{row['stored']} +{row['delivers']}\n"
            )
            assert re.search(printed, ended.stdout)
        else:
            assert row["rates"] is None
            assert "not installed" in ended.stdout
    assert found["rows"][0]["ratio_to_baseline"] == 1
    assert [(target["workers"], target["at_least"]) for target in found["targets"]] == [
        (workers, least) for workers in (0, 2) for least in (1.25, 1, 1, 2.3, 0.95, 0.9)
    ]
    assert found["photos"]["images"] == FEWEST_IMAGES
    assert found["versions"]["torch"] == "2.7.0"
    assert found["command"].startswith("d2v benchmark data --num-images")
    assert found["command"] in ended.stdout
    assert not any(work.iterdir())
    progress = r"[\w ,-]+: \d+ of \d+ (passes|images|shards), .*"
    assert [line for line in ended.stderr.splitlines() if not re.fullmatch(progress, line)] == []


@pytest.mark.slow
def test_litdata_leaves_ctrl_c_to_the_command(tmp_path: Path) -> None:
    """It ends a process at SIGINT with status 0, and our server would run on."""
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(encoded_image(0))
    code = f"""
import signal
from pathlib import Path
from d2v_composer.benchmarks.data import UINT8, litdata_chunks

before = signal.getsignal(signal.SIGINT)
litdata_chunks([Path({str(photo)!r})], Path({str(tmp_path / "out")!r}), 1, UINT8).start(0)
assert signal.getsignal(signal.SIGINT) is before
"""
    ended = run_command(sys.executable, "-c", code)
    assert ended.returncode == 0, ended.stderr


STEP = ["step", "--size", "quickstart", "--batch-size", "2", "--repeats", "1", "--precision", "amp_bf16"]
STEP_ROWS = ["naive", "+ one encoder", "+ fused attention", "+ half frozen weights", "+ fused AdamW"]
VARIANT_ROWS = ["ours, no ALiBi", "ours, checkpointing", "ours, health each step"]


@pytest.mark.parametrize(
    ("options", "more_rows"),
    [
        (["--no-compile"], VARIANT_ROWS),
        pytest.param([], ["+ torch.compile", *VARIANT_ROWS], marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_step_rows_and_target(
    benchmark: Callable[[Sequence[str]], Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    more_rows: list[str],
) -> None:
    report = tmp_path / "report.json"
    benchmark([*STEP, *options, "--json", str(report)])
    printed, found = capsys.readouterr().out, json.loads(report.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == STEP_ROWS + more_rows
    for name, row in rows.items():
        assert len(row["rates"]) == 1
        assert row["gemm_share"] > 0
        assert row["mfu"] is None
        assert re.search(rf"\n{re.escape(name)} +[\d.]+ +[\d.]+ – [\d.]+ +[\d.]+ +\d+ ", printed)
        assert name == "ours, no ALiBi" or row["loss"] == pytest.approx(rows["naive"]["loss"], rel=1e-3)
    # Two encoders whole or one; frozen weights in float32 or half of it.
    held = {name: row["held_bytes"] for name, row in rows.items()}
    assert held["naive"] > held["+ fused attention"] > held["+ half frozen weights"] == held["ours, checkpointing"]
    assert rows["naive"]["step_bytes"] > rows["+ fused AdamW"]["step_bytes"] > rows["ours, checkpointing"]["step_bytes"]
    assert rows["naive"]["attention_kernels"] == []
    assert rows["+ fused attention"]["attention_kernels"] == []  # of the teacher's 65 time steps, in bfloat16
    assert (found["precision"], found["device_batch_size"]) == ("amp_bf16", 2)
    (health,) = found["targets"]
    ours = rows.get("+ torch.compile", rows["+ fused AdamW"])
    each_step = np.median(ours["rates"]) / np.median(rows["ours, health each step"]["rates"])
    assert health["ratio"] == pytest.approx(1 / (1 + (each_step - 1) / 100), rel=0.01)


@pytest.mark.usefixtures("one_thread")
def test_a_timm_teacher_is_compared_with_data2vec2_of_equal_sizes(
    benchmark: Callable[[Sequence[str]], Any], tmp_path: Path
) -> None:
    teacher = ["--teacher", "timm/test_vit", "--precision", "fp32", "--no-compile", "--batch-size", "1"]
    found = {}
    for size in ("48", "32x48"):
        report = tmp_path / f"{size}.json"
        benchmark(["step", *teacher, "--image-size", size, "--repeats", "1", "--json", str(report)])
        found[size] = json.loads(report.read_text())
    ours, equal = (
        next(row for row in found["48"]["rows"] if row["name"] == name)
        for name in ("+ fused AdamW", "ours, data2vec 2.0 of equal sizes")
    )
    target = next(each for each in found["48"]["targets"] if each["what"].startswith("share of the matrix product"))
    assert target["ratio"] == pytest.approx(ours["gemm_share"] / equal["gemm_share"])
    assert "ours, data2vec 2.0 of equal sizes" not in {row["name"] for row in found["32x48"]["rows"]}  # not square


def test_data2vec2_of_equal_sizes_costs_the_same() -> None:
    for name in ("timm/test_vit", "timm/vit_tiny_patch16_224", "timm/eva02_tiny_patch14_224"):
        model = build_sized_model(name)
        assert isinstance(model.teacher, TimmTeacher)
        equal = build_equal_model(model.teacher)
        assert equal is not None
        images = torch.zeros(1, 3, *height_and_width(model.teacher.config.image_size))
        assert equal.flops_per_batch(images) == pytest.approx(model.flops_per_batch(images), rel=0.02)


@pytest.mark.usefixtures("one_thread")
def test_retrieval_rows_and_targets(
    benchmark: Callable[[Sequence[str]], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    sizes = ["--bank", "3000", "--queries", "200", "--dim", "64", "--k", "5", "--evaluation-images", "30"]
    benchmark(["retrieval", "--size", "quickstart", *sizes, "--repeats", "2", "--json", str(report)])
    found = json.loads(report.read_text())
    rows = {row["name"]: row for row in found["neighbors"]}
    assert list(rows) == [
        "matrix product alone",
        "ours",
        "torch, all at once",
        "faiss IndexFlatIP",
        "scikit-learn brute",
    ]
    for name, row in rows.items():
        assert row["rates"] is not None or (name.startswith("faiss") and find_spec("faiss") is None)
    assert 0 < rows["ours"]["peak_bytes"] < 256 * 2**20
    assert [row["name"] for row in found["inputs"]] == ["PIL, one by one", "ours, in batches"]
    assert found["evaluation_seconds"] > 0
    assert "a whole evaluation, 30 images of 32 px" in capsys.readouterr().out
    assert {target["what"] for target in found["targets"]} >= {"ours / matrix product alone"}


def test_a_search_that_finds_other_neighbors_is_refused() -> None:
    bank, queries = torch.randn(50, 8), torch.randn(6, 8)
    right = (normalize(queries, dim=1) @ normalize(bank, dim=1).T).topk(3).indices.numpy()
    wrong = right.copy()
    wrong[4, 1] = next(i for i in range(50) if i not in right[4])
    check_neighbors(bank, queries, {"ours": right, "theirs": right})
    with pytest.raises(RuntimeError, match="'theirs' finds other neighbors than 'ours'"):
        check_neighbors(bank, queries, {"ours": right, "theirs": wrong})


def test_contenders_that_find_another_loss_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"'\+ one encoder' finds the loss 2.01, 'naive' 2.0"):
        check_losses({"naive": 2.0, "+ one encoder": 2.01})
    check_losses({"naive": 2.0, "ours, no ALiBi": 1.5, "+ one encoder": 2.001})


def is_installed(name: str) -> bool:
    if "S3" in name:
        return shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") is not None
    package = name.split()[0]
    return package not in ("litdata", "webdataset") or find_spec(package) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-images", "31"], "--num-images: must be 32 or more, got 31"),
        (["--repeats", "0"], "--repeats: must be 1 or more, got 0"),
        (["--workers", "0", "-1"], "--workers: must be 0 to 64, got 0 -1"),
        (["--clock", "cpu"], "--clock cpu: does not count worker processes; use --workers 0"),
        (["--images", "absent"], "absent: no such folder"),
        (["--work", "absent"], "--work: no such folder: absent"),
        (["--json", "absent/report.json"], "--json: no such folder: absent"),
        (["step", "--batch-size", "0"], "--batch-size: must be 1 or more, got 0"),
        (["step", "--steps", "0"], "--steps: must be 1 or more, got 0"),
        (["step", "--no-compile", "--teacher", "base"], "--teacher: must be timm/NAME, got 'base'"),
        (["step", "--no-compile", "--image-size", "64"], "--image-size: needs --teacher timm/NAME"),
        (["step", "--device", "cuda"], "--device cuda: torch finds no GPU on this machine"),
        (["step", "--precision", "amp_fp16"], "--precision amp_fp16: needs a GPU; allowed on a CPU: fp32, amp_bf16"),
        (["retrieval", "--k", "21", "--bank", "20"], "--k: must be at most --bank 20, got 21"),
        (["retrieval", "--evaluation-images", "5"], "--evaluation-images: must be 6 or more, got 5"),
        (["retrieval", "--dim", "0"], "--dim: must be 1 or more, got 0"),
    ],
)
def test_refuses_bad_arguments(
    benchmark: Callable[[Sequence[str]], Any], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError) as caught:
        benchmark(arguments if arguments[0] in ("step", "retrieval") else ["data", *arguments])
    assert str(caught.value) == message


def test_refuses_too_few_images(benchmark: Callable[[Sequence[str]], Any], tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(encoded_image(i))
    with pytest.raises(InputError, match=rf"^{tmp_path}: has 3 images; at least 32 are needed$"):
        benchmark(["data", "--images", str(tmp_path)])


def test_photos_have_the_sizes_of_imagenets_and_depend_on_the_seed(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 200)
    paths = sorted(photos.folder.glob("*/*.jpg"))
    assert len(paths) == photos.images == 200
    assert len({path.parent for path in paths}) == 7
    assert photos.mean_width == pytest.approx(452, rel=0.03)
    assert photos.mean_height == pytest.approx(387, rel=0.03)
    assert photos.mean_bytes == pytest.approx(110_000, rel=0.1)
    for path in paths[:20]:
        with Image.open(path) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert 300 <= min(image.size) <= max(image.size) <= 500

    again = make_photos(tmp_path / "again", 200)
    for path in paths:
        assert (again.folder / path.relative_to(photos.folder)).read_bytes() == path.read_bytes()
    other = make_photos(tmp_path / "other", 14, seed=1)
    assert all(
        path.read_bytes() != (photos.folder / path.relative_to(other.folder)).read_bytes()
        for path in other.folder.glob("*/*.jpg")
    )


def test_photos_of_a_folder_are_rgb_jpegs(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    jpegs = {encoded_image(i) for i in range(9)}
    for i, jpeg in enumerate(jpegs):
        (source / f"{i}.jpg").write_bytes(jpeg)
    Image.fromarray(np.zeros((40, 30), np.uint8)).save(source / "gray.png")

    photos = take_photos(str(source), tmp_path / "all", 100)
    assert photos.images == 10
    taken = {path.read_bytes() for path in photos.folder.glob("*/*.jpg")}
    assert len(taken - jpegs) == 1
    assert jpegs < taken
    for path in photos.folder.glob("*/*.jpg"):
        with Image.open(path) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")

    assert take_photos(str(source), tmp_path / "some", 4).images == 4
    (source / "damaged.jpg").write_bytes(encoded_image(1)[:100])
    with pytest.raises(InputError, match=r"damaged\.jpg: cannot be read"):
        take_photos(str(source), tmp_path / "damaged", 100)


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
    rates = interleave(passes, 8, 3, "letters", clock=lambda: now[0])
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert rates == {"a": Rates([8, 4, 8]), "b": Rates([4, 2, 4])}
    assert rates["a"].median == 8
    assert rates["b"].ratio(rates["a"]) == 0.5


def test_one_core_holds_all_threads() -> None:
    allowed = os.sched_getaffinity(0)
    end, started = threading.Event(), threading.Event()

    def wait() -> None:
        started.set()
        end.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    started.wait()
    try:
        assert thread.native_id is not None
        with one_core():
            assert len(os.sched_getaffinity(0)) == 1
            assert os.sched_getaffinity(thread.native_id) == os.sched_getaffinity(0) <= allowed
        assert os.sched_getaffinity(thread.native_id) == os.sched_getaffinity(0) == allowed
    finally:
        end.set()
        thread.join()
