"""The console script: its commands, their next steps, and readers that leave."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import d2v_composer
from d2v_composer.commands import evaluate as evaluate_command
from d2v_composer.commands.__main__ import main
from d2v_composer.config.load import load_evaluate_config
from d2v_composer.system import command_line
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, ROOT


def test_version_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status, line in (
        (["--version"], 0, f"d2v-composer {d2v_composer.__version__}"),
        ([], 2, "the following arguments are required: COMMAND"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == status
        assert line in "".join(capsys.readouterr())


def test_an_evaluation_needs_no_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        (tmp_path / "photos" / split).mkdir(parents=True)
    photos = "datasets={photos: {format: folder, root: photos}}"
    config = load_evaluate_config([f"model={GOLDEN / 'tiny_base.pt'}", photos, "pooling=mean"])
    assert (config.pooling, config.ks, list(config.datasets)) == ("mean", [1, 3], ["photos"])
    assert evaluate_command.next_step(config).endswith("tiny_base.pt IMAGES embeddings.npy --pooling mean")
    with pytest.raises(InputError, match=r"datasets: must have at least one .* such as 'datasets=\{cifar10: "):
        load_evaluate_config([f"model={GOLDEN / 'tiny_base.pt'}"])
    with pytest.raises(InputError, match="model: is required"):
        load_evaluate_config([photos])


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
