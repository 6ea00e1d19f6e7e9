"""What a command says next, and a reader that leaves."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from d2v_composer.system import command_line
from helpers import ROOT


def test_the_next_step_can_be_copied(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, python = tmp_path / "bin" / "d2v", tmp_path / "bin" / "python"
    script.parent.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PATH", "/usr/bin")
    assert command_line.d2v("embed", "a b") == f"{python} -m d2v_composer.commands embed 'a b'"
    script.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    assert command_line.d2v("embed") == "d2v embed"
    command_line.print_next("one", "two")
    monkeypatch.setenv("RANK", "1")
    command_line.print_next("three")
    assert capsys.readouterr().out == "next: one\nnext: two\n"


def test_a_command_ends_quietly_without_its_reader(tmp_path: Path) -> None:
    code = "from d2v_composer.system import command_line as line; line.run(lambda _: print('line\\n' * 100_000))"
    ended = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shlex.join([sys.executable, '-c', code])} | head -n 1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "line\n", "")
