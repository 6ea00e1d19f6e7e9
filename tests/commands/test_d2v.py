"""The help of commands starts without heavy modules; the next command that one prints can be copied into this shell.

What commands import at work, tests/core/test_systems.py shows.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from d2v_composer.commands.__main__ import COMMANDS
from d2v_composer.system import command_line
from helpers import ROOT

# Runs each command line of a JSON list, as its script would, and prints the status and the heavy modules after it.
RUN = """
import json, runpy, sys
HEAVY = {"composer", "matplotlib", "streaming", "sympy", "timm", "torch", "torchvision"}
for program, *arguments in json.loads(sys.argv[1]):
    sys.argv = [program, *arguments]
    try:
        if program == "d2v":
            runpy.run_module("d2v_composer.commands", run_name="__main__")
        else:
            runpy.run_path(program, run_name="__main__")
    except SystemExit as ended:
        print(json.dumps([ended.code, sorted(HEAVY & sys.modules.keys())]))
"""


# Programs to read, which import what they need at their head.
PLAIN = {"benchmark.py", "detect.py", "embed_onnx.py", "finetune.py", "minimal.py", "own_teacher.py", "stock.py"}


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    """In one fresh interpreter."""
    recipes = [str(path) for path in sorted((ROOT / "recipes").glob("*.py")) if path.name not in PLAIN]
    commands = [["d2v", "--help"], *([program, "--help"] for program in recipes)]
    commands += [["d2v", name, "--help"] for name in COMMANDS]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, json.dumps(commands)]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    answers = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("[")]
    assert answers == [[0, []]] * len(commands), ended.stderr


def test_the_next_step_can_be_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, python = tmp_path / "bin" / "d2v", tmp_path / "bin" / "python"
    script.parent.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PATH", "/usr/bin")
    assert command_line.d2v("embed", "a b") == "d2v embed 'a b'"
    script.touch(mode=0o755)
    assert command_line.d2v("embed") == "bin/d2v embed"
    monkeypatch.setenv("PATH", str(script.parent))
    assert command_line.d2v("embed") == "d2v embed"


def test_rank_0_prints_the_next_steps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command_line.print_next("one", "two")
    monkeypatch.setenv("RANK", "1")
    command_line.print_next("three")
    assert capsys.readouterr().out == "next: one\nnext: two\n"
