"""d2v train and d2v init: the YAMLs travel, and a machine's GPUs are all used."""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from d2v_composer.commands import train
from helpers import GOLDEN, d2v, losses_of, small_run


def test_a_yaml_that_travels_trains(small_data: Path, tmp_path: Path) -> None:
    printed = d2v("init", "quickstart", cwd=tmp_path)
    assert printed.stderr.startswith("next: ")
    assert printed.stderr.rstrip().endswith("train FILE.yaml")
    (tmp_path / "my.yaml").write_text(printed.stdout)
    _, *overrides = small_run(tmp_path / "run", small_data, "max_duration=2ba", "scheduler.t_warmup=0ba")
    trained = d2v("train", "my.yaml", *overrides, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert len(losses_of(tmp_path / "run")) == 2
    assert "\ncommand: d2v train my.yaml teacher" in (tmp_path / "run" / "run.yaml").read_text()


def test_several_gpus_have_a_rank_each(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def execv(program: str, arguments: Sequence[str]) -> None:
        started.append(arguments)
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        raise SystemExit

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit):
        train.main([str(GOLDEN / "no.yaml"), "seed=3"])
    launcher = [sys.executable, "-m", "composer.cli", "-m", "d2v_composer.commands"]
    assert started == [[*launcher, "train", str(GOLDEN / "no.yaml"), "seed=3"]]
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match=r"no\.yaml: cannot be read"):
        train.main([str(GOLDEN / "no.yaml"), "seed=3"])
    assert len(started) == 1
