"""recipes/ablations.py without its images and without a network; the README's figures."""

import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from d2v_composer.config.load import load_config
from d2v_composer.config.schema import TrainConfig
from d2v_composer.conversion import convert
from d2v_composer.runs.trainer import build_run_record
from d2v_composer.system.addresses import RunFolder
from d2v_composer.system.errors import InputError
from helpers import QUICKSTART, ROOT, refused_by, start_python, wait_until, write_files
from programs.preloaded import Program
from recipes import ablations
from recipes.ablations import as_overrides, read_rows

TRAIN = ROOT / "recipes" / "train.py"
Plan = Callable[..., dict[str, TrainConfig]]


def write_study(folder: Path, rows: str) -> Path:
    shutil.copy(ROOT / "yamls" / "quickstart.yaml", folder / "base.yaml")
    (folder / "rows.yaml").write_text(rows)
    return folder


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A call of the command that converts and trains nothing, and returns the settings of each row's run."""
    monkeypatch.setattr(convert, "convert_cifar10", Mock())
    monkeypatch.setattr(ablations, "train_rows", train_rows := Mock(side_effect=InterruptedError))

    def call_command(*arguments: str | Path) -> dict[str, TrainConfig]:
        with pytest.raises(InterruptedError):
            ablations.main([str(argument) for argument in arguments])
        commands, folders = train_rows.call_args.args
        assert {tuple(command[:2]) for command in commands.values()} == {(sys.executable, str(TRAIN))}
        configs = {row: load_config(command[2:]) for row, command in commands.items()}
        assert all(config.run_folder == RunFolder(folders[row]) for row, config in configs.items())
        return configs

    return call_command


def test_a_wrong_argument_is_one_line() -> None:
    for arguments, message in (
        ("nowhere", "^nowhere/rows.yaml cannot be read: No such file or directory"),
        ("--rows=no such", r"^--rows: no such row 'no such' \(allowed: base, another seed, "),
    ):
        with pytest.raises(InputError, match=message):
            ablations.main([arguments])


@pytest.mark.parametrize(
    "rows", ["", "- seed: 18", "a: {seed: 18", "a: 18", "a: {num_images: x}", "0.1: {}", "a: {}\na: {}"]
)
def test_a_malformed_study_is_one_line(rows: str, tmp_path: Path) -> None:
    (tmp_path / "rows.yaml").write_text(rows)
    assert str(tmp_path / "rows.yaml") in refused_by(read_rows, tmp_path)


def test_each_row_has_a_folder_of_its_own(plan: Plan, tmp_path: Path) -> None:
    names = ["base", "crop 0.9,1", "crop 0.91", "ä", "1.10"]
    study = write_study(tmp_path, "".join(f'"{name}": {{}}\n' for name in names))
    configs = plan(study, "--out", tmp_path / "out")
    assert [*configs] == names
    assert len({config.run_name for config in configs.values()}) == len(names)
    assert configs["crop 0.9,1"].run_folder == RunFolder(tmp_path / "out" / "crop_0.9,1")


def test_a_row_wins_over_the_changes_of_all_rows_and_keeps_its_own_folder(plan: Plan, tmp_path: Path) -> None:
    row = "{seed: 18, retrieval.max_images: null, train_loader.crop_scale: [0.5, 1]}"
    study = write_study(tmp_path, f"base: {{}}\na: {row}")
    configs = plan(study, "seed=3", "save_folder=elsewhere", "--images", QUICKSTART, "--whole", "--out", tmp_path)
    assert (configs["base"].seed, configs["a"].seed) == (3, 18)
    assert (configs["a"].run_folder, configs["a"].run_name) == (RunFolder(tmp_path / "a"), "a")
    assert configs["a"].train_loader.local == str(QUICKSTART / "cifar10" / "train")
    assert (configs["a"].retrieval.max_images, configs["a"].train_loader.crop_scale) == (None, (0.5, 1.0))


# A run that waits for SIGTERM, and saves.
WAITS = """
import signal, sys
from pathlib import Path

options = dict(each.split("=", 1) for each in sys.argv[2:])
folder = Path(options["save_folder"].replace("{run_name}", options["run_name"]))

def save(*_):
    (folder / "saved").touch()
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # as train.py, which takes it in another way
folder.mkdir(parents=True)
(folder / "started").touch()
signal.pause()
"""
WITH_ROOT = """
import sys
from pathlib import Path
from d2v_composer.conversion import convert
from d2v_composer.system import command_line
from recipes import ablations

ablations.ROOT = Path(sys.argv.pop(1))
convert.convert_cifar10 = lambda *_: None
command_line.run(ablations.main)
"""


def start_with(recipe: str, folder: Path, *rows: str) -> Program:
    """Start the command with another program in place of recipes/train.py; its runs are in the same folder."""
    write_files(folder, {"recipes/train.py": recipe.encode()})
    return start_python("-c", WITH_ROOT, folder, *(f"--rows={row}" for row in rows), "--out", folder)


def test_a_failed_row_is_told_at_once_and_sigterm_lets_the_next_save(tmp_path: Path) -> None:
    fails = 'import sys\nif "run_name=base" in sys.argv:\n    sys.exit(2)\n'
    failure = f"base: failed with status 2; see {tmp_path / 'base.txt'}; continuing with the other rows\n"
    program = start_with(fails + WAITS, tmp_path, "depth 1", "depth 2")
    wait_until(lambda: (tmp_path / "depth_1" / "started").exists() and failure == program.stderr)
    program.send_signal(signal.SIGTERM)
    assert program.wait(timeout=20) == 143
    assert program.stderr == f"{failure}SIGTERM: the same command resumes\n"
    assert (tmp_path / "depth_1" / "saved").exists()
    assert not (tmp_path / "depth_2").exists()


def test_all_failures_end_the_command(tmp_path: Path) -> None:
    program = start_with("import sys\nsys.exit(2)\n", tmp_path, "depth 1")
    assert program.wait(timeout=20) == 2
    assert [line for line in program.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: base: failed with status 2; see {tmp_path / 'base.txt'}",
        f"error: depth 1: failed with status 2; see {tmp_path / 'depth_1.txt'}",
    ]


def test_rows_of_other_settings_are_refused_by_name_before_anything_is_done(plan: Plan, tmp_path: Path) -> None:
    """A table is of one command's settings, also if another call trained some of its rows."""
    command, folder = ("--rows", "depth 1", "--out", tmp_path), tmp_path / "depth_1"
    record = build_run_record(plan(*command)["depth 1"]).record
    write_files(folder, {"run.yaml": yaml.safe_dump(record).encode()})
    plan(*command)
    with pytest.raises(InputError, match=r"depth 1: .*max_duration.*train_loader\.crop_scale"):
        plan(*command, "max_duration=600ba", "train_loader.crop_scale=[0.5,1]")


def config_of(study: Path, row: Mapping[str, Any]) -> TrainConfig:
    images = QUICKSTART / "cifar10"
    places = (f"train_loader.local={images / 'train'}", f"retrieval.datasets.cifar10.root={images}")
    return load_config([str(study / "base.yaml"), *places, *as_overrides(row)])


@pytest.mark.parametrize("path", sorted(ablations.STUDIES.glob("*/rows.yaml")), ids=lambda path: path.parent.name)
def test_every_row_is_a_valid_run(path: Path) -> None:
    for row in read_rows(path.parent).values():
        config_of(path.parent, row)
