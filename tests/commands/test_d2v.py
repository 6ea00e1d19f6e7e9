"""The next command that a command prints can be copied into this shell."""

import sys
from pathlib import Path

import pytest

from d2v_composer.system import command_line


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
