"""d2v train and d2v init: the YAMLs travel, and a machine's GPUs are all used."""

import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from d2v_composer.commands import init, train
from d2v_composer.config.load import load_config
from helpers import GOLDEN, ROOT, d2v, losses_of, small_run, succeed


def test_a_yaml_that_travels_trains(small_data: Path, tmp_path: Path) -> None:
    printed = d2v("init", "quickstart", cwd=tmp_path)
    assert printed.stderr.startswith("next: ")
    assert printed.stderr.rstrip().endswith("train FILE.yaml")
    (tmp_path / "my.yaml").write_text(printed.stdout)
    _, *overrides = small_run(tmp_path / "run", small_data, "max_duration=2ba", "scheduler.t_warmup=0ba")
    succeed("train", "my.yaml", *overrides, cwd=tmp_path)
    assert len(losses_of(tmp_path / "run")) == 2
    assert "\ncommand: d2v train my.yaml teacher" in (tmp_path / "run" / "run.yaml").read_text()


def test_a_yaml_names_files_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(init, "YAMLS", folder := tmp_path / "a #1: {b}")
    shutil.copytree(ROOT / "yamls", folder, ignore=shutil.ignore_patterns("quickstart*_*", "cifar10"))
    init.main(["quickstart"])
    (tmp_path / "my.yaml").write_text(capsys.readouterr().out)
    config = load_config([str(tmp_path / "my.yaml")])
    assert config.teacher.checkpoint == str(folder / "quickstart" / "teacher.safetensors")


def test_several_gpus_have_a_rank_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command replaces itself by Composer's launcher, with SIGTERM unblocked; a rank goes on to train."""

    def execv(program: str, arguments: Sequence[str]) -> None:
        started.append([program, *arguments])
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        raise SystemExit

    started, given = [], (str(GOLDEN / "no.yaml"), "seed=3")
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit):
        train.main(given)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match=r"no\.yaml cannot be read"):
        train.main(given)
    launcher = [sys.executable, "-m", "composer.cli", "-m", "d2v_composer.commands", "train"]
    assert started == [[sys.executable, *launcher, *given]]
