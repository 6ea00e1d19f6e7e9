"""Benchmarks: their rows and ratios, and that all contenders do the same work; never how fast it is."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_composer.benchmarks.measure import one_core
from d2v_composer.benchmarks.retrieval import check_neighbors
from d2v_composer.benchmarks.step import check_losses
from d2v_composer.commands import benchmark
from d2v_composer.system.errors import InputError
from gated_store import GatedStore


def run(tmp_path: Path, *arguments: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Run a benchmark with one repeat, and return its rates and ratios."""
    report = tmp_path / "report.json"
    benchmark.main([*arguments, "--repeats", "1", "--json", str(report)])
    found: dict[str, Any] = json.loads(report.read_text())
    rates = {row["name"]: row["rates"][0] for row in found["rows"]}
    assert all(rate > 0 for rate in rates.values())
    return rates, {each["what"]: pytest.approx(each["ratio"]) for each in found["ratios"]}


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_data_beside_image_folder_and_litdata(
    workers: str, tmp_path: Path, object_store: GatedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    remote = f"{object_store.create_bucket(f'benchmark{workers}')}/images"
    rates, ratios = run(tmp_path, "data", "--num-images", "32", "--workers", workers, "--remote", remote)
    assert list(rates) == ["ImageFolder + PIL", "litdata + PIL", "ours, local disk", "ours, S3 warm"]
    assert ratios == {
        "ours, local disk ÷ ImageFolder + PIL": rates["ours, local disk"] / rates["ImageFolder + PIL"],
        "ours, S3 warm ÷ ours, local disk": rates["ours, S3 warm"] / rates["ours, local disk"],
    }


@pytest.mark.parametrize("options", [["--no-compile"], pytest.param([], marks=pytest.mark.slow)])
@pytest.mark.usefixtures("one_thread")
def test_step_beside_the_naive_program(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It checks that they find the same loss."""
    small = ["--batch-size", "2", "--precision", "amp_bf16", "--size", "quickstart"]
    rates, ratios = run(tmp_path, "step", *small, *options)
    assert list(rates) == ["naive", "ours, eager", *([] if options else ["ours"]), "matrix product alone"]
    ours = "ours, eager" if options else "ours"
    of_naive = rates[ours] / rates["naive"]
    assert ratios[f"{ours} ÷ naive"] == of_naive
    assert f"{ours} ÷ naive: {of_naive:.2f}" in capsys.readouterr().out


@pytest.mark.usefixtures("one_thread")
def test_retrieval_beside_the_matrix_product_and_faiss(tmp_path: Path) -> None:
    rates, ratios = run(tmp_path, "retrieval", "--bank", "3000", "--queries", "200", "--dim", "64", "--k", "5")
    assert list(rates) == ["matrix product alone", "ours", "faiss IndexFlatIP"]
    assert ratios == {"ours ÷ matrix product alone": rates["ours"] / rates["matrix product alone"]}


def test_contenders_that_find_something_else_are_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"'ours' finds the loss 2\.0[\d]*, 'naive' 2.0"):
        check_losses({"naive": torch.tensor(2.0), "ours": torch.tensor(2.01)})
    check_losses({"naive": torch.tensor(2.0), "ours": torch.tensor(2.001)})
    right = torch.arange(18).view(6, 3)
    wrong = right.clone()
    wrong[4, 1] = 0
    check_neighbors(right, right)
    with pytest.raises(RuntimeError, match="finds other neighbors than 'ours'"):
        check_neighbors(wrong, right)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "--images", "absent"], "absent: cannot be read: No such file or directory"),
        (["retrieval", "--k", "21", "--bank", "20"], "--k: must be at most --bank 20, got 21"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        benchmark.main(arguments)
    assert str(caught.value).startswith(message)


def test_one_core_holds_the_threads_that_start_in_it() -> None:
    allowed, found = os.sched_getaffinity(0), []
    with one_core():
        thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
        thread.start()
        thread.join()
    assert len(found[0]) == 1
    assert os.sched_getaffinity(0) == allowed
