"""Benchmarks: their rows and ratios, and that all contenders do the same work; never how fast it is."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_composer.benchmarks import one_core
from d2v_composer.benchmarks import step as step_benchmark
from d2v_composer.benchmarks.retrieval import check_neighbors
from d2v_composer.benchmarks.step import check_losses
from d2v_composer.commands import benchmark
from d2v_composer.models.configs import RELEASED
from d2v_composer.system.errors import InputError
from gated_store import GatedStore
from helpers import slow


def run(tmp_path: Path, *arguments: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Run a benchmark with one repeat, and return its rates and ratios."""
    report = tmp_path / "report.json"
    benchmark.main([*arguments, "--repeats", "1", "--json", str(report)])
    result: dict[str, Any] = json.loads(report.read_text())
    rates = {row["name"]: row["rates"][0] for row in result["rows"]}
    assert all(rate > 0 for rate in rates.values())
    return rates, {row["what"]: pytest.approx(row["ratio"]) for row in result["ratios"]}


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_data_beside_image_folder(workers: str, tmp_path: Path, reachable_store: GatedStore) -> None:
    remote = f"{reachable_store.create_bucket(f'benchmark{workers}')}/images"
    rates, ratios = run(tmp_path, "data", "--num-images", "32", "--workers", workers, "--remote", remote)
    assert list(rates) == ["ImageFolder + PIL", "ours, local disk", "ours, S3 warm"]
    assert ratios == {
        "ours, local disk ÷ ImageFolder + PIL": rates["ours, local disk"] / rates["ImageFolder + PIL"],
        "ours, S3 warm ÷ ours, local disk": rates["ours, S3 warm"] / rates["ours, local disk"],
    }


@pytest.fixture
def small_audio(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a size, small as the quickstart's, with a block in the encoder."""
    base = RELEASED["base_audio"]
    spec = "[(32, 10, 5)] + [(32, 3, 2)] * 4 + [(32, 2, 2)] * 2"
    encoder = base.encoder.changed(embed_dim=192, prenet_depth=1, feature_encoder_spec=spec)
    small = base.changed(encoder=encoder, depth=2, average_top_k_layers=2), 1
    monkeypatch.setitem(step_benchmark.SIZES, "base_audio", small)
    return "base_audio"


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ("quickstart", ["--no-compile"]),
        ("base_audio", ["--no-compile"]),
        slow("quickstart", []),
    ],
)
@pytest.mark.usefixtures("one_thread", "small_audio")
def test_step_beside_the_naive_program(
    size: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It checks that they find the same loss."""
    small = ["--batch-size", "2", "--precision", "amp_bf16", "--size", size]
    rates, ratios = run(tmp_path, "step", *small, *options)
    assert list(rates) == ["naive", "eager", *([] if options else ["ours"]), "matrix product alone"]
    ours = "eager" if options else "ours"
    of_naive = rates[ours] / rates["naive"]
    assert ratios[f"{ours} ÷ naive"] == of_naive
    assert f"{ours} ÷ naive: {of_naive:.2f}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_step_in_the_trainer_with_a_trace(tmp_path: Path) -> None:
    """The Trainer finds the loss of the bare loop; the trace opens in Perfetto, and the result names the kernels."""
    trace = tmp_path / "trace.json"
    small = ["--batch-size", "2", "--precision", "fp32", "--size", "quickstart", "--no-compile"]
    rates, ratios = run(tmp_path, "step", *small, "--only", "eager", "--loop", "trainer", "--trace", str(trace))
    assert list(rates) == ["eager", "trainer", "matrix product alone"]
    assert ratios["trainer ÷ eager"] == rates["trainer"] / rates["eager"]
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"aten::addmm", "Optimizer.step#AdamW.step"} <= names
    assert "Self CPU time total" in trace.with_suffix(".txt").read_text()
    result = json.loads((tmp_path / "report.json").read_text())
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in result["attention"]


@pytest.mark.usefixtures("one_thread")
def test_retrieval_beside_the_matrix_product_and_faiss(tmp_path: Path) -> None:
    rates, ratios = run(tmp_path, "retrieval", "--bank", "3000", "--queries", "200", "--dim", "64", "--k", "5")
    assert list(rates) == ["matrix product alone", "ours", "faiss IndexFlatIP"]
    assert ratios == {"ours ÷ matrix product alone": rates["ours"] / rates["matrix product alone"]}


def test_contenders_that_find_something_else_are_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"'ours' computes a loss of 2\.0[\d]*, but 'naive' computes 2.0"):
        check_losses({"naive": torch.tensor(2.0), "ours": torch.tensor(2.01)})
    check_losses({"naive": torch.tensor(2.0), "ours": torch.tensor(2.001)})
    right = torch.arange(18).view(6, 3)
    wrong = right.clone()
    wrong[4, 1] = 0
    check_neighbors(right, right)
    with pytest.raises(RuntimeError, match="and 'ours' find different neighbors"):
        check_neighbors(wrong, right)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "--images", "absent"], "absent cannot be read: No such file or directory"),
        (["retrieval", "--k", "21", "--bank", "20"], "--k: must be at most 20, the value of --bank; got 21"),
        (
            ["step", "--no-compile", "student.model=timm/resnet18"],
            "student.model: must be null, got timm/resnet18; --s",
        ),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        benchmark.main(arguments)
    assert str(caught.value).startswith(message)


def test_one_core_holds_the_threads_that_start_in_it() -> None:
    allowed, affinities = os.sched_getaffinity(0), []
    with one_core():
        thread = threading.Thread(target=lambda: affinities.append(os.sched_getaffinity(0)))
        thread.start()
        thread.join()
    assert len(affinities[0]) == 1
    assert os.sched_getaffinity(0) == allowed
