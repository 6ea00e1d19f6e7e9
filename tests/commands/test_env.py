"""d2v env prints what a bug report needs, without Composer too."""

import subprocess
import sys

import pytest

from d2v_composer.commands.env import find_missing
from d2v_composer.system import machine
from helpers import ROOT


def test_a_bug_report_needs_no_composer() -> None:
    program = [sys.executable, ROOT / "tests" / "programs" / "light.py"]
    ended = subprocess.run(program, input="env", capture_output=True, text=True, check=True, timeout=60)
    named = dict(line.split(maxsplit=1) for line in ended.stdout.splitlines())
    assert {"python", "torch", "mosaicml", "cpu", "cores", "gpu", "extra"} <= {*named}


def test_a_missing_package_and_another_version_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_missing("train") == []
    monkeypatch.setattr(machine, "package_versions", lambda *names: dict.fromkeys(names) | {"torch": "2.13.0"})
    assert find_missing("train")[:3:2] == ["torch==2.7.0", "mosaicml==0.32.1"]
