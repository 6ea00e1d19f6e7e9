"""recipes/ablations.py without its images and without a network."""

import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn
from urllib.error import URLError

import pytest
import torch
from torchvision.datasets import cifar

from d2v_composer.builders.models import build_model
from d2v_composer.checkpoints import timm_weights
from d2v_composer.config.load import load_config
from d2v_composer.data import convert
from d2v_composer.models.timm_teacher import TimmTeacher, build_timm_model, teacher_config
from d2v_composer.system import command_line
from d2v_composer.system.errors import InputError
from helpers import QUICKSTART, ROOT, refused_by, start_python, wait_until
from recipes import ablations
from recipes.ablations import Runs, Study


def test_images_that_cannot_be_downloaded_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> NoReturn:
        raise URLError("no route to host")

    monkeypatch.setattr(cifar, "download_and_extract_archive", fail)
    monkeypatch.setattr(sys, "argv", ["ablations.py", "--images", str(tmp_path), "--out", str(tmp_path / "runs")])
    with pytest.raises(SystemExit, match="2"):
        command_line.run(ablations.main)
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}: no readable CIFAR10 (")
    assert line.endswith(f"; unpack https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz in {tmp_path}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no study, which has base.yaml and rows.yaml (base.yaml: No such file or directory)"),
        (["yamls/ablations/timm", "seed"], "seed: must be key=value"),
        (["--jobs", "0"], "--jobs: must be at least 1, got 0"),
        (["--rows", "no such"], "--rows: no such row 'no such' (allowed: base, another seed, "),
    ],
)
def test_a_wrong_argument_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError) as raised:
        ablations.main([*arguments, "--images", str(tmp_path)])
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "must have keys and values"),
        ("- seed: 18", "must have keys and values"),
        ("a: {seed: 18", "not a YAML of keys and values: "),
        ("a: 18", "a: a row is its name and {key: value}, got 18"),
        ("1: {seed: 18}", "1: a row is its name and {key: value}, got {'seed': 18}"),
        (None, "no study, which has base.yaml and rows.yaml (rows.yaml: No such file or directory)"),
    ],
)
def test_a_malformed_study_is_one_line(rows: str | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("seed: 17")
    if rows is not None:
        (tmp_path / "rows.yaml").write_text(rows)
    assert message in refused_by(lambda folder: Study.read(folder, []), tmp_path)


@pytest.mark.parametrize(
    ("argv", "study", "changes", "rows"),
    [
        ([], "data2vec2", [], None),
        (["seed=3"], "data2vec2", ["seed=3"], None),
        (["{timm}", "--jobs", "1", "seed=3"], "timm", ["seed=3"], None),
        (["--rows", "depth 1", "seed=3", "--rows", "depth 2"], "data2vec2", ["seed=3"], ["depth 1", "depth 2"]),
        (["a=s3://b/c", "{timm}=3"], "data2vec2", ["a=s3://b/c", "{timm}=3"], None),
    ],
)
def test_changes_may_stand_anywhere(
    argv: list[str], study: str, changes: list[str], rows: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[object] = []

    def choose(study: Study, names: list[str] | None) -> NoReturn:
        found.extend([study.base.parent.name, list(study.changes), names])
        raise InputError("stop")

    monkeypatch.setattr(Study, "choose", choose)
    with pytest.raises(InputError, match="stop"):
        ablations.main([argument.replace("{timm}", str(ablations.STUDIES / "timm")) for argument in argv])
    assert found == [study, [change.replace("{timm}", str(ablations.STUDIES / "timm")) for change in changes], rows]


def test_a_row_wins_over_the_changes_of_all_rows_and_keeps_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    class Ended:
        def __init__(self, command: list[str], **options: object) -> None:
            commands.append(command)

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(ablations.subprocess, "Popen", Ended)
    study = Study(QUICKSTART.parent / "quickstart.yaml", {"a": {"seed": 18}}, ["seed=3", "save_folder=elsewhere"])
    folder, images = tmp_path / "a", QUICKSTART / "cifar10"
    ablations.train(study, "a", folder, images, Runs(threads=1))
    [[python, script, *arguments]] = commands
    assert (python, script) == (sys.executable, str(ROOT / "recipes" / "train.py"))
    config = load_config(arguments)
    assert (config.seed, config.save_folder, config.run_name) == (18, str(folder), "a")
    assert config.train_loader.local == str(images / "train")


# A run that waits for SIGTERM, and saves.
WAITS = """
import signal, sys
from pathlib import Path

folder = Path(next(each.partition("=")[2] for each in sys.argv if each.startswith("save_folder=")))

def save(*_):
    (folder / "saved").touch()
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # as train.py, which takes it in another way
(folder / "started").touch()
signal.pause()
"""
WITH_ROOT = """
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from d2v_composer.data import convert
from d2v_composer.system import command_line
from recipes import ablations

ablations.ROOT = Path(sys.argv.pop(1))
convert.convert_cifar10 = lambda *_: None
command_line.run(ablations.main)
"""


def test_sigterm_stops_the_runs_as_well(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "train.py").write_text(WAITS)
    rows = ("--rows", "depth 1", "--rows", "depth 2", "--jobs", "2")
    program = start_python("-c", WITH_ROOT, tmp_path, *rows, "--out", tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("*/started"))) == 2)
    program.send_signal(signal.SIGTERM)
    assert program.wait(timeout=20) == 143
    assert program.stderr == "SIGTERM: the same command resumes\n"
    assert sorted(path.parent.name for path in tmp_path.glob("*/saved")) == ["base", "depth_1"]
    assert not (tmp_path / "depth_2").exists()


@pytest.mark.parametrize("has_folder", [True, False])
def test_a_failed_row_is_told_at_once_and_a_signal_then_still_stops_the_others(
    has_folder: bool, tmp_path: Path
) -> None:
    (tmp_path / "recipes").mkdir()
    fails = 'import sys\nif any(each.endswith("/base") for each in sys.argv):\n    sys.exit(2)\n'
    (tmp_path / "recipes" / "train.py").write_text(fails + WAITS)
    failure = f"base: failed with status 2, see {tmp_path / 'base' / 'output.txt'}"
    if not has_folder:
        (tmp_path / "base").touch()
        failure = f"[Errno 17] File exists: '{tmp_path / 'base'}'"
    program = start_python("-c", WITH_ROOT, tmp_path, "--rows", "depth 1", "--out", tmp_path)
    wait_until(lambda: (tmp_path / "depth_1" / "started").exists() and failure in program.stderr)
    assert program.stderr == f"{failure}; the other rows go on\n"
    program.send_signal(signal.SIGTERM)
    assert program.wait(timeout=20) == 143
    assert program.stderr.endswith("\nSIGTERM: the same command resumes\n")
    assert (tmp_path / "depth_1" / "saved").exists()


def test_all_failures_end_the_command(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "train.py").write_text("import sys\nsys.exit(2)\n")
    program = start_python("-c", WITH_ROOT, tmp_path, "--rows", "depth 1", "--out", tmp_path)
    assert program.wait(timeout=20) == 2
    assert sorted(line for line in program.stderr.splitlines() if line.startswith("error: ")) == [
        f"error: {name}: failed with status 2, see {tmp_path / name / 'output.txt'}" for name in ("base", "depth_1")
    ]


def test_an_override_is_what_the_row_says() -> None:
    row = {"retrieval.max_images": None, "targets.source": "block", "train_loader.crop_scale": [0.5, 1]}
    study = Study(QUICKSTART.parent / "quickstart.yaml", {"a": row}, [])
    config = load_config([str(study.base), *study.overrides("a")])
    assert config.retrieval.max_images is None
    assert (config.targets.source, config.train_loader.crop_scale) == ("block", (0.5, 1.0))


@pytest.mark.parametrize("path", sorted(ablations.STUDIES.glob("*/rows.yaml")), ids=lambda path: path.parent.name)
def test_every_row_is_a_valid_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config is right, and teacher and student of its sizes can be built, here without weights."""

    def load_timm_teacher(
        path: None, model: str, first_blocks: int, image_size: int, option: Callable[[str], str]
    ) -> TimmTeacher:
        built = build_timm_model(model, image_size)
        return TimmTeacher(built, teacher_config(model, built, first_blocks))

    monkeypatch.setattr(timm_weights, "load_timm_teacher", load_timm_teacher)
    places = {
        "train_loader.local": QUICKSTART / "cifar10" / "train",
        "retrieval.datasets.cifar10.root": QUICKSTART / "cifar10",
    }
    base = load_config([str(path.parent / "base.yaml"), *(f"{key}={value}" for key, value in places.items())])
    study = Study.read(path.parent, [])
    for name in study.rows:
        overrides = [*(f"{key}={value}" for key, value in places.items()), *study.overrides(name)]
        config = load_config([str(study.base), *overrides])
        is_another_reading = (config.targets.normalization, config.teacher.first_blocks) != (
            base.targets.normalization,
            base.teacher.first_blocks,
        )
        measures_baselines = config.retrieval.at_start and "teacher" in config.retrieval.baselines
        assert measures_baselines == (name == "base" or is_another_reading), name
        with torch.device("meta") if config.teacher.checkpoint is None else nullcontext():
            model = build_model(config)
        assert len(model.student.blocks) == config.student.depth, name


def test_choices_are_compared_at_equal_compute() -> None:
    study = Study.read(ablations.STUDIES / "choices", [])
    images = QUICKSTART / "cifar10"
    places = (f"train_loader.local={images / 'train'}", f"retrieval.datasets.cifar10.root={images}")
    batch = torch.zeros(32, 3, 32, 32, dtype=torch.uint8)
    costs = {}
    for name in study.rows:
        config = load_config([str(study.base), *places, *study.overrides(name)])
        costs[name] = int(config.max_duration.removesuffix("ba")) * build_model(config).flops_per_batch(batch)
    assert costs == pytest.approx(dict.fromkeys(costs, costs["base"]), rel=2e-3)


@pytest.mark.parametrize(("options", "folder"), [([], "cifar10_sample"), (["--whole"], "cifar10")])
def test_whole_uses_all_images(
    options: list[str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[object, ...]] = []
    used: list[Path] = []

    def train_rows(study: Study, folders: object, images: Path, jobs: int) -> NoReturn:
        used.append(images)
        raise InputError("stop")

    monkeypatch.setattr(convert, "convert_cifar10", lambda *arguments: written.append(arguments))
    monkeypatch.setattr(ablations, "train_rows", train_rows)
    with pytest.raises(InputError, match="stop"):
        ablations.main([*options, "--images", str(tmp_path)])
    assert used == [tmp_path / folder]
    assert written == [(tmp_path, tmp_path / folder, *([] if options else [10_000, 2_000]))]
