"""recipes/ablations.py without its images and without a network."""

import sys
from pathlib import Path
from typing import NoReturn
from urllib.error import URLError

import pytest
from torchvision.datasets import cifar

from d2v_composer.system import cli
from recipes import ablations


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
