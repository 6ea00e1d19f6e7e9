"""recipes/ablations.py without its images and without a network."""

import sys
from pathlib import Path
from typing import NoReturn
from urllib.error import URLError

import pytest
from torchvision.datasets import cifar

from d2v_composer.config.load import load_config
from d2v_composer.system import cli
from d2v_composer.system.errors import InputError
from helpers import ROOT
from recipes import ablations
from recipes.ablations import Study


def test_images_that_cannot_be_downloaded_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> NoReturn:
        raise URLError("no route to host")

    monkeypatch.setattr(cifar, "download_and_extract_archive", fail)
    monkeypatch.setattr(sys, "argv", ["ablations.py", "--images", str(tmp_path), "--out", str(tmp_path / "runs")])
    with pytest.raises(SystemExit, match="2"):
        cli.run(ablations.main)
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: --images: {tmp_path}: no readable CIFAR10 (")
    assert line.endswith(f"; unpack https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz in {tmp_path}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no study, which has base.yaml and rows.yaml (No such file or directory)"),
        (["yamls/ablations/timm", "seed"], "seed: must be key=value"),
        (["--jobs", "0"], "--jobs: must be at least 1, got 0"),
        (["--rows", "no such"], "--rows: no such row 'no such' (allowed: base, another seed, "),
    ],
)
def test_a_wrong_argument_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError) as raised:
        ablations.main([*arguments, "--images", str(tmp_path)])
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("study", sorted(ablations.STUDIES.glob("*/rows.yaml")), ids=lambda path: path.parent.name)
def test_every_row_is_a_valid_run(study: Path) -> None:
    quickstart = ROOT / "yamls" / "quickstart"
    places = {
        "teacher.checkpoint": quickstart / "teacher.safetensors",
        "train_loader.local": quickstart / "cifar10" / "train",
        "retrieval.datasets.cifar10.root": quickstart / "cifar10",
    }
    for name, changes in Study.read(study.parent, []).rows.items():
        overrides = [f"{key}={value}" for key, value in {**places, **changes}.items()]
        config = load_config([str(study.parent / "base.yaml"), *overrides])
        assert config.retrieval.at_start == (name == "base"), name
