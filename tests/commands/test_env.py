"""d2v env prints what a bug report needs, without Composer too; a missing package and another version are named."""

import subprocess
import sys

import pytest

from d2v_composer.commands import env
from d2v_composer.system import machine
from helpers import ROOT


def test_a_bug_report_needs_no_composer() -> None:
    program = [sys.executable, ROOT / "tests" / "programs" / "light.py"]
    ended = subprocess.run(program, input="env", capture_output=True, text=True, check=True, timeout=60)
    assert {"python", "torch", "cpu", "cores", "extra"} <= {line.split()[0] for line in ended.stdout.splitlines()}


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "package_versions", lambda *names: dict.fromkeys(names) | {"torch": "2.13.0+cpu"})
    env.main([])
    named = "lacks torch==2.7.0 torchvision==0.22.0 mosaicml==0.32.1 mosaicml-streaming==0.13.0 boto3"
    assert f"extra train         {named}\n" in capsys.readouterr().out
