"""Anyone's module as the teacher, by recipes/own_teacher.py and the entry point of the guide."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_composer import FrozenModel, load_config, load_student, load_teacher, train_student
from helpers import (
    ROOT,
    datasets_of,
    load_checkpoint,
    refused_run,
    run_command,
    slow,
    small_run,
    succeed,
    train_command,
)


class Patches(torch.nn.Unfold):
    def __init__(self) -> None:
        super().__init__(4, stride=8)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).transpose(1, 2)


# Runs a program in an environment where the packages of two folders are installed.
INSTALLED = """
import runpy, sys
sys.path += [sys.argv.pop(1), sys.argv.pop(1)]
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
KINDS = {"blocks": ["student.depth=2"], "network": ["student.depth=5", "student.model=timm/test_byobnet"]}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe, which a second folder in it offers as an installed package."""
    folder, guide = tmp_path_factory.mktemp("package"), (ROOT / "recipes/guides/students.md").read_text()
    [entry] = re.findall("```toml\n(.*?)```", guide, flags=re.DOTALL)
    shutil.copy(ROOT / "recipes" / "own_teacher.py", folder)
    install(folder / "installed", "mine", re.sub('.*"(.*)".*\n', r"[\1]\n", entry, count=1).replace('"', ""))
    return folder


def install(folder: Path, name: str, entry_points: str) -> None:
    """Write what pip would leave of a package in a folder, without its code."""
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(entry_points)


def settings(folder: Path, data: Path, kind: str, *overrides: str) -> list[str]:
    teacher = "teacher.model=ext/own_teacher", "teacher.checkpoint=null"
    changes = ["retrieval.representation=output", *teacher, *KINDS[kind]]
    return small_run(folder, data, *changes, "max_duration=4ba", *overrides)


@pytest.fixture(scope="module", params=["blocks", slow("network")])
def run(request: Any, package: Path, small_data: Path, labeled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / request.param
    options = settings(folder, small_data, request.param, f"retrieval.{datasets_of(labeled)}")
    ended = run_command(sys.executable, package / "own_teacher.py", *options[1:])
    assert ended.returncode == 0, ended.stderr
    return folder


def test_its_student_is_exported_and_evaluated_without_the_code(run: Path, labeled: Path, tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "student.safetensors", run / "latest-rank0.pt"
    succeed("export", checkpoint, out)
    assert "The run's last retrieval" in (tmp_path / "README.md").read_text()
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert load_student(out).embed(images).isfinite().all()
    for model in (checkpoint, out):  # which have the same weights, so the second replaces the results of the first
        rows, said = evaluated(tmp_path, f"model={model}", datasets_of(labeled), "baselines=[pixels,encoder]")
        assert rows == {"pixels", "student"}  # its encoder is its own
        assert "the untrained student is not measured: its alignment needs the run's teacher (teacher=PATH)" in said
        rows, said = evaluated(tmp_path, f"model={model}", datasets_of(labeled), "pooling=mean")  # needs no alignment
        assert rows == {"pixels", "untrained student", "student"}
        assert "not measured" not in said


def evaluated(folder: Path, *options: str) -> tuple[set[str], str]:
    """Return the rows of an evaluation, and what it says on stderr."""
    ended = succeed("evaluate", f"out={folder}", *options)
    results = json.loads((folder / "evaluation.json").read_text())["results"]
    return {row["candidate"] for row in results}, ended.stderr


def test_a_run_resumes_only_with_it(run: Path, package: Path, small_data: Path) -> None:
    arguments = settings(run, small_data, run.name, "max_duration=6ba")
    assert "teacher.model: no installed package provides ext/own_teacher (entry point" in refused_run(arguments)
    ended = run_command(sys.executable, "-c", INSTALLED, package, package / "installed", *train_command(arguments)[1:])
    assert ended.returncode == 0, ended.stderr
    assert load_checkpoint(run / "latest-rank0.pt")["state"]["timestamp"]["Timestamp"]["batch"] == 6


def test_a_name_that_two_packages_offer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 12: the order of sys.path must not decide which teacher is meant."""
    for name in ("mine", "other"):
        install(tmp_path / name, name, f"[d2v_composer.teachers]\nmine = {name}:load\n")
        monkeypatch.syspath_prepend(tmp_path / name)
    problem = r"^model: mine \(mine:load\) and other \(other:load\) provide the entry point 'mine' of the group "
    problem += r"d2v_composer\.teachers; "
    with pytest.raises(ValueError, match=problem):
        load_teacher(None, model="ext/mine")


class Own(Patches):
    """Its weight is an attribute that no state dict has."""

    weight, is_flipped = 1.0, False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        tokens = self.weight * super().forward(input)
        return tokens.flip(1) if self.is_flipped else tokens


def own_teacher(**changes: Any) -> FrozenModel:
    module = Own()
    for name, value in changes.items():
        setattr(module, name, value)
    return FrozenModel(module, source="none", image_size=32, grid_size=(4, 4), has_cls_token=False)


def test_a_resume_with_another_teacher_is_refused(small_data: Path, tmp_path: Path) -> None:
    """Promise 12: it may differ by what processors round differently."""
    changes = ("retrieval.pooling=mean_patches", "alignment.max_samples=0", "scheduler.t_warmup=0ba")
    arguments = settings(tmp_path, small_data, "blocks", *changes, "max_duration=1ba")
    train_student(load_config(arguments), teacher=own_teacher())
    config = load_config([*arguments, "max_duration=2ba"])
    for changed in ({"weight": 1.1}, {"is_flipped": True}):
        with pytest.raises(ValueError, match=r"teacher \(its outputs for fixed inputs\): checkpoint has \["):
            train_student(config, teacher=own_teacher(**changed))
    train_student(config, teacher=own_teacher(weight=1.0001))


def test_bad_input_is_one_line(package: Path, small_data: Path, tmp_path: Path) -> None:
    """Promise 18: a module without CLS."""
    code = (package / "own_teacher.py").read_text().replace("(images)", "(images)[:, 1:]").replace("True", "False")
    (tmp_path / "mine.py").write_text(code)
    changes = settings(
        tmp_path / "run", small_data, "blocks", "retrieval.datasets={a: {root: a}}", "retrieval.pooling=cls"
    )
    ended = run_command(sys.executable, tmp_path / "mine.py", *changes[1:])
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert ended.stderr.startswith(
        "error: retrieval: representation and pooling: this model has no output_cls; it has "
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tokens: (tokens, tokens), r"must map images \(1, 3, 32, 32\) to tokens \(1, 16, D\), got tuple"),
        (lambda tokens: tokens * torch.nan, "the teacher's outputs are not finite"),
    ],
)
def test_a_module_that_returns_something_else_is_refused(
    change: Callable[[torch.Tensor], Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Own.forward
    monkeypatch.setattr(Own, "forward", lambda module, images: change(forward(module, images)))
    with pytest.raises(ValueError, match=problem):
        own_teacher()


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ({"has_cls_token": True}, r"must map images \(1, 3, 32, 32\) to tokens \(1, 17, D\), got \(1, 16, 48\)"),
        ({"grid_size": (2, 8)}, r"a square grid of patches of whole pixels, got a grid of 2 x 8 for 32 x 32 pixels"),
        ({"image_mean": (2.0, 0.0, 0.0)}, "image_mean must be less than or equal to 1, got 2.0"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(sizes: dict[str, Any], problem: str) -> None:
    usual = {"image_size": (32, 32), "grid_size": (4, 4), "has_cls_token": False}
    with pytest.raises(ValueError, match=problem):
        FrozenModel(Patches(), source="none", **(usual | sizes)).build_student(depth=1)
