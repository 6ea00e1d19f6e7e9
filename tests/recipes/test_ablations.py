"""recipes/ablations.py without its images and without a network; the README's figures."""

import csv
import re
import signal
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import Mock

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
from helpers import QUICKSTART, ROOT, refused_by, start_python, wait_until
from recipes import ablations
from recipes.ablations import as_overrides, read_rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere/rows.yaml cannot be read: No such file or directory"),
        (["--rows", "no such"], "--rows: no such row 'no such' (allowed: base, another seed, "),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError) as raised:
        ablations.main(arguments)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    "rows", ["", "- seed: 18", "a: {seed: 18", "a: 18", "a: {num_images: x}", "0.1: {}", "a: {}\na: {}"]
)
def test_a_malformed_study_is_one_line(rows: str, tmp_path: Path) -> None:
    (tmp_path / "rows.yaml").write_text(rows)
    assert str(tmp_path / "rows.yaml") in refused_by(read_rows, tmp_path)


def test_each_row_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["base", "crop 0.9,1", "crop 0.91", "ä", "1.10"]
    (tmp_path / "rows.yaml").write_text("".join(f'"{name}": {{}}\n' for name in names))
    started, check = Mock(side_effect=InterruptedError), Mock()
    monkeypatch.setattr(convert, "convert_cifar10", started)
    monkeypatch.setattr(ablations, "check_rows", check)
    with pytest.raises(InterruptedError):
        ablations.main([str(tmp_path), "--out", str(tmp_path / "out")])
    commands, folders = check.call_args.args
    assert [*folders] == names
    assert len({*folders.values()}) == len(names)
    assert folders["crop 0.9,1"] == tmp_path / "out" / "crop_0.9,1"
    for name, (_, _, _, *overrides) in commands.items():
        config = load_config([str(QUICKSTART.parent / "quickstart.yaml"), *overrides])
        assert config.run_folder == RunFolder(folders[name]), name


def test_a_row_wins_over_the_changes_of_all_rows_and_keeps_its_own_folder(tmp_path: Path) -> None:
    row = {"seed": 18, "retrieval.max_images": None, "train_loader.crop_scale": [0.5, 1]}
    folder, images = tmp_path / "a", QUICKSTART / "cifar10"
    changes = ["seed=3", "save_folder=elsewhere"]
    python, script, base, *overrides = ablations.train_command(tmp_path, row, changes, folder, images)
    assert (python, script, base) == (sys.executable, str(ROOT / "recipes" / "train.py"), str(tmp_path / "base.yaml"))
    config = load_config([str(QUICKSTART.parent / "quickstart.yaml"), *overrides])
    assert (config.seed, config.run_folder, config.run_name) == (18, RunFolder(folder), "a")
    assert config.train_loader.local == str(images / "train")
    assert (config.retrieval.max_images, config.train_loader.crop_scale) == (None, (0.5, 1.0))


def test_a_row_trains_on_the_first_images_and_is_measured_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the command converts as many images of each split as the rows need."""
    (tmp_path / "rows.yaml").write_text("base: {}\nfew: {num_images: 500, seed: 18}")
    row, images = read_rows(tmp_path)["few"], QUICKSTART / "cifar10"
    command = ablations.train_command(tmp_path, row, [], tmp_path / "few", images)
    config = load_config([str(QUICKSTART.parent / "quickstart.yaml"), *command[3:]])
    assert (config.seed, config.train_loader.local) == (18, str(QUICKSTART / "cifar10_500" / "train"))
    assert getattr(config.retrieval.datasets["cifar10"], "root", None) == str(images)
    converted = Mock()
    monkeypatch.setattr(convert, "convert_cifar10", converted)
    monkeypatch.setattr(ablations, "check_rows", Mock())
    monkeypatch.setattr(ablations, "train_rows", Mock(side_effect=InterruptedError))
    with pytest.raises(InterruptedError):
        ablations.main([str(tmp_path), "--whole", "--images", "data", "--out", str(tmp_path)])
    data = Path("data")
    assert [call.args for call in converted.call_args_list] == [
        (data, data / "cifar10"),
        (data, data / "cifar10_500", 500, 0),
    ]


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
from collections.abc import Mapping
from pathlib import Path
from d2v_composer.conversion import convert
from d2v_composer.system import command_line
from recipes import ablations

ablations.ROOT = Path(sys.argv.pop(1))
convert.convert_cifar10 = lambda *_: None
command_line.run(ablations.main)
"""


def test_a_failed_row_is_told_at_once_and_sigterm_lets_the_next_save(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    fails = 'import sys\nif "run_name=base" in sys.argv:\n    sys.exit(2)\n'
    (tmp_path / "recipes" / "train.py").write_text(fails + WAITS)
    failure = f"base: failed with status 2; see {tmp_path / 'base.txt'}; continuing with the other rows\n"
    rows = ("--rows", "depth 1", "--rows", "depth 2")
    program = start_python("-c", WITH_ROOT, tmp_path, *rows, "--out", tmp_path)
    wait_until(lambda: (tmp_path / "depth_1" / "started").exists() and failure == program.stderr)
    program.send_signal(signal.SIGTERM)
    assert program.wait(timeout=20) == 143
    assert program.stderr == f"{failure}SIGTERM: the same command resumes\n"
    assert (tmp_path / "depth_1" / "saved").exists()
    assert not (tmp_path / "depth_2").exists()


def test_all_failures_end_the_command(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "train.py").write_text("import sys\nsys.exit(2)\n")
    program = start_python("-c", WITH_ROOT, tmp_path, "--rows", "depth 1", "--out", tmp_path)
    assert program.wait(timeout=20) == 2
    assert sorted(line for line in program.stderr.splitlines() if line.startswith("error: ")) == [
        f"error: {name}: failed with status 2; see {tmp_path / folder}.txt"
        for name, folder in (("base", "base"), ("depth 1", "depth_1"))
    ]


def test_rows_of_other_settings_are_refused_by_name_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table is of one command's settings, also if another call trained some of its rows."""
    rows, out = ("--rows", "depth 1"), ("--out", str(tmp_path))
    folder, study = tmp_path / "depth_1", ablations.STUDIES / "data2vec2"
    row = read_rows(study)["depth 1"]
    _, _, *arguments = ablations.train_command(study, row, [], folder, Path("datasets/cifar10_sample"))
    folder.mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump(build_run_record(load_config(arguments), ()).record))
    monkeypatch.setattr(convert, "convert_cifar10", Mock(side_effect=InterruptedError))
    with pytest.raises(InterruptedError):
        ablations.main([*rows, *out])
    changes = ("max_duration=600ba", "train_loader.crop_scale=[0.5,1]")
    with pytest.raises(InputError) as raised:
        ablations.main([*rows, *out, *changes])
    assert str(raised.value) == (
        "depth 1: max_duration: checkpoint has 1200ba, config has 600ba; train_loader.crop_scale: checkpoint has "
        f"[0.08, 1.0], config has [0.5, 1.0]; choose another --out, or remove {folder}"
    )


def config_of(study: Path, row: Mapping[str, Any]) -> TrainConfig:
    images = QUICKSTART / "cifar10"
    places = (f"train_loader.local={images / 'train'}", f"retrieval.datasets.cifar10.root={images}")
    return load_config([str(study / "base.yaml"), *places, *as_overrides(row)])


def reading_of(config: TrainConfig) -> tuple[Any, ...]:
    return config.targets.normalization, config.teacher.first_blocks, config.student.embed_dim, config.student.model


@pytest.mark.parametrize("path", sorted(ablations.STUDIES.glob("*/rows.yaml")), ids=lambda path: path.parent.name)
def test_every_row_is_a_valid_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config is right, and teacher and student of its sizes can be built, here without weights."""

    def load_timm_teacher(path: None, model: str, first_blocks: int, image_size: int, _: bool) -> TimmTeacher:
        built = build_timm_model(model, image_size)
        return TimmTeacher(built, teacher_config(model, built, first_blocks))

    monkeypatch.setattr(timm_weights, "load_timm_teacher", load_timm_teacher)
    monkeypatch.setattr(DistillationModel, "_try_step", lambda _: None)  # the meta device computes nothing
    base, built = config_of(path.parent, {}), set[str]()
    for name, row in read_rows(path.parent).items():
        config = config_of(path.parent, row)
        is_another_reading = reading_of(config) != reading_of(base)
        measures_baselines = config.retrieval.at_start and "teacher" in config.retrieval.baselines
        assert measures_baselines == (name == "base" or is_another_reading), name
        models = str((config.teacher, config.student, config.targets, config.objectives, config.prediction))
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


@pytest.mark.parametrize(
    ("results", "study"),
    [
        ("data2vec2", "data2vec2"),
        ("choices", "choices"),
        ("width", "choices"),
        ("timm", "timm"),
        ("objectives", "data2vec2"),
        ("objectives", "timm"),
    ],
)
def test_results_are_those_of_a_studys_rows(results: str, study: str) -> None:
    with (ablations.STUDIES / f"{results}.csv").open() as file:
        assert {line["row"] for line in csv.DictReader(file)} <= read_rows(ablations.STUDIES / study).keys()


def test_the_readmes_tables_show_what_the_csv_of_their_section_holds() -> None:
    sections = re.split(r"\n##+ ", (ablations.STUDIES / "README.md").read_text())
    checked = []
    for section in sections:
        named = re.search(r"\]\((\w+)\.csv\)", section)
        table = re.findall(r"^\|(.*)\|$", section, flags=re.MULTILINE)[2:]
        if named and table:
            with (ablations.STUDIES / f"{named[1]}.csv").open() as file:
                results = list(csv.reader(file))
            for line in table:
                name, *cells = (cell.strip() for cell in line.split("|"))
                held = [value for result in results if name in result for value in result]
                assert {*re.findall(r"-?[\d.]+", " ".join(cells))} <= {*held}, (named[1], name)
            checked.append(named[1])
    assert checked == ["data2vec2", "choices", "width", "cifar10", "timm", "timm_epoch", "objectives", "audio"]


def test_the_teachers_index_shows_the_mean_of_its_seeds() -> None:
    with (ablations.STUDIES / "index.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["run"].startswith("5 blocks") and row["pairs"] == "2000"]
    shown = ("student", "all", "output_mean", "ridge")
    chosen = [row for row in rows if tuple(row[key] for key in ("model", "inputs", "target", "map")) == shown]
    assert len(chosen) == 3
    means = [f"{mean(float(row[key]) for row in chosen):.1f}" for key in ("own_index", "teacher_index", "neighbors")]
    assert "".join(f" | **{value}**" for value in means) in (ablations.STUDIES / "README.md").read_text()
