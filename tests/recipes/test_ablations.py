"""recipes/ablations.py without its images and without a network; the README's figures."""

import csv
import re
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
import yaml

from d2v_composer.checkpoints import timm_weights
from d2v_composer.config.load import load_config
from d2v_composer.config.schema import TrainConfig
from d2v_composer.conversion import convert
from d2v_composer.models.timm_teacher import TimmTeacher, build_timm_model, teacher_config
from d2v_composer.objectives.distillation import DistillationModel
from d2v_composer.runs.distill import build_model
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


def test_a_row_trains_on_the_first_images_and_is_measured_on_all(plan: Plan, tmp_path: Path) -> None:
    """And the command converts as many images of each split as the rows need."""
    study, images = write_study(tmp_path, "base: {}\nfew: {num_images: 500}"), QUICKSTART / "cifar10"
    config = plan(study, "--whole", "--images", QUICKSTART, "--out", tmp_path)["few"]
    assert config.train_loader.local == str(QUICKSTART / "cifar10_500" / "train")
    assert getattr(config.retrieval.datasets["cifar10"], "root", None) == str(images)
    converted: Any = convert.convert_cifar10
    assert converted.call_args_list == [call(QUICKSTART, images), call(QUICKSTART, QUICKSTART / "cifar10_500", 500, 0)]


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
    problem = "depth 1: max_duration: checkpoint has 1200ba, this run has 600ba; "
    problem += "train_loader.crop_scale: checkpoint has [0.08, 1.0], this run has [0.5, 1.0]; "
    problem += f"choose another --out, or remove {folder}"
    with pytest.raises(InputError, match=re.escape(problem)):
        plan(*command, "max_duration=600ba", "train_loader.crop_scale=[0.5,1]")


def config_of(study: Path, row: Mapping[str, Any]) -> TrainConfig:
    images = QUICKSTART / "cifar10"
    places = (f"train_loader.local={images / 'train'}", f"retrieval.datasets.cifar10.root={images}")
    return load_config([str(study / "base.yaml"), *places, *as_overrides(row)])


def reading_of(config: TrainConfig) -> tuple[Any, ...]:
    """Return what the embeddings of the untrained student and the teacher depend on."""
    tokens, student = config.objectives.tokens, config.student
    return tokens.normalization, config.teacher.first_blocks, student.embed_dim, student.model


@pytest.mark.parametrize("path", sorted(ablations.STUDIES.glob("*/rows.yaml")), ids=lambda path: path.parent.name)
def test_every_row_is_a_valid_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config is right, and teacher and student of its sizes can be built, here without weights."""

    def load_timm_teacher(path: None, model: str, first_blocks: int, image_size: int) -> TimmTeacher:
        built = build_timm_model(model, image_size)
        return TimmTeacher(built, teacher_config(model, built, first_blocks))

    monkeypatch.setattr(timm_weights, "load_timm_teacher", load_timm_teacher)
    monkeypatch.setattr(DistillationModel, "_freeze_unused", lambda _: None)  # the meta device computes nothing
    base, built = config_of(path.parent, {}), set[str]()
    for name, row in read_rows(path.parent).items():
        config = config_of(path.parent, row)
        is_another_reading = reading_of(config) != reading_of(base)
        measures_baselines = config.retrieval.at_start and "teacher" in config.retrieval.baselines
        assert measures_baselines == (name == "base" or is_another_reading), name
        models = str((config.teacher, config.student, config.objectives))
        need_weights = config.student.model or config.objectives.embedding.weight
        if models not in built and not need_weights:
            built.add(models)
            with torch.device("meta") if config.teacher.checkpoint is None else nullcontext():
                model = build_model(config)
            assert len(model.student.blocks) == config.student.depth, name


def test_choices_are_compared_at_equal_compute() -> None:
    study = ablations.STUDIES / "choices"
    batch = torch.zeros(32, 3, 32, 32, dtype=torch.uint8)
    costs = {}
    for name, row in read_rows(study).items():
        if name.endswith("as many steps"):
            continue
        config = config_of(study, row)
        costs[name] = int(config.max_duration.removesuffix("ba")) * build_model(config).flops_per_batch(batch)
    assert costs == pytest.approx(dict.fromkeys(costs, costs["base"]), rel=2e-3)


def results_of(name: str) -> list[dict[str, str]]:
    with (ablations.STUDIES / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


# Rows whose options no longer exist.
REMOVED = {"CLS alone", "cosine and smooth L1", "cosine and smooth L1, another seed", "dataset normalization"}
STUDIES = {"data2vec2": ["data2vec2", "objectives"], "choices": ["choices", "width"], "timm": ["timm", "objectives"]}


@pytest.mark.parametrize(("study", "tables"), STUDIES.items())
def test_results_are_those_of_a_studys_rows(study: str, tables: list[str]) -> None:
    rows = read_rows(ablations.STUDIES / study).keys()
    assert {result["row"] for table in tables for result in results_of(table)} <= rows | REMOVED


def test_the_readmes_tables_show_what_the_csv_of_their_section_holds() -> None:
    checked = []
    for section in re.split(r"\n##+ ", (ablations.STUDIES / "README.md").read_text()):
        named = re.search(r"\]\((\w+)\.csv\)", section)
        table = re.findall(r"^\|(.*)\|$", section, flags=re.MULTILINE)[2:]
        if named and table:
            results = [[*result.values()] for result in results_of(named[1])]
            for line in table:
                name, *cells = (cell.strip() for cell in line.split("|"))
                held = [value for result in results if name in result for value in result]
                assert {*re.findall(r"-?[\d.]+", " ".join(cells))} <= {*held}, (named[1], name)
            checked.append(named[1])
    assert checked == ["data2vec2", "choices", "cifar10", "timm", "timm_epoch", "objectives", "audio"]


def test_the_teachers_index_shows_the_mean_of_its_seeds() -> None:
    shown = {"model": "student", "inputs": "all", "target": "output_mean", "map": "ridge", "pairs": "2000"}
    rows = [row for row in results_of("index") if row["run"].startswith("5 blocks") and shown.items() <= row.items()]
    assert len(rows) == 3
    means = [f"{mean(float(row[key]) for row in rows):.1f}" for key in ("own_index", "teacher_index", "neighbors")]
    assert "".join(f" | **{value}**" for value in means) in (ablations.STUDIES / "README.md").read_text()
