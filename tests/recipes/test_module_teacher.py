"""Anyone's module as the teacher, by the script of the guide."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_composer import FrozenModel, load_student, load_teacher
from helpers import ROOT, datasets_of, load_checkpoint, refused_run, run_command, small_run, succeed, train_command


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
    """A folder with the guide's script, which a second folder in it offers as an installed package."""
    folder, guide = tmp_path_factory.mktemp("package"), (ROOT / "recipes/guides/own-teacher.md").read_text()
    code, entry = re.findall("```(?:python|toml)\n(.*?)```", guide, flags=re.DOTALL)
    (folder / "mine.py").write_text(code)
    install(folder / "installed", "mine", re.sub('.*"(.*)".*\n', r"[\1]\n", entry, count=1).replace('"', ""))
    return folder


def install(folder: Path, name: str, entry_points: str) -> None:
    """Write what pip would leave of a package in a folder, without its code."""
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(entry_points)


def settings(folder: Path, data: Path, kind: str, *overrides: str) -> list[str]:
    changes = ["retrieval.representation=output", "teacher.model=ext/mine", "teacher.checkpoint=null", *KINDS[kind]]
    return small_run(folder, data, *changes, "max_duration=4ba", *overrides)


@pytest.fixture(scope="module", params=KINDS)
def run(request: Any, package: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / request.param
    ended = run_command(sys.executable, package / "mine.py", *settings(folder, small_data, request.param)[1:])
    assert ended.returncode == 0, ended.stderr
    return folder


def test_its_student_is_exported_and_evaluated_without_the_code(run: Path, labeled: Path, tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "student.safetensors", run / "latest-rank0.pt"
    succeed("export", checkpoint, out)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert load_student(out).embed(images).isfinite().all()
    for model in (checkpoint, out):
        shown = succeed("evaluate", f"model={model}", datasets_of(labeled)).stdout
        assert "untrained student" in shown
        assert "teacher" not in shown


def test_a_run_resumes_only_with_it(run: Path, package: Path, small_data: Path) -> None:
    arguments = settings(run, small_data, run.name, "max_duration=6ba")
    assert "teacher.model: no installed package offers ext/mine by an entry point" in refused_run(arguments)
    ended = run_command(sys.executable, "-c", INSTALLED, package, package / "installed", *train_command(arguments)[1:])
    assert ended.returncode == 0, ended.stderr
    assert load_checkpoint(run / "latest-rank0.pt")["state"]["timestamp"]["Timestamp"]["batch"] == 6


def test_a_name_that_two_packages_offer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """12: the order of sys.path must not decide which teacher is meant."""
    for name in ("mine", "other"):
        install(tmp_path / name, name, f"[d2v_composer.teachers]\nmine = {name}:load\n")
        monkeypatch.syspath_prepend(tmp_path / name)
    problem = r"^model: mine \(mine:load\) and other \(other:load\) offer 'mine' in d2v_composer.teachers; "
    with pytest.raises(ValueError, match=problem):
        load_teacher(None, model="ext/mine")


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ({"has_cls_token": True}, r"must map \(1, 3, 32, 32\) to \(1, 17, D\), got \(1, 16, 48\)"),
        ({"grid_size": (2, 8)}, r"need a square grid of whole patches, got 2 x 8 for \(32, 32\) pixels"),
        ({"image_mean": (2.0, 0.0, 0.0)}, "image_mean must be less than or equal to 1, got 2.0"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(sizes: dict[str, Any], problem: str) -> None:
    usual = {"image_size": (32, 32), "grid_size": (4, 4), "has_cls_token": False}
    with pytest.raises(ValueError, match=problem):
        FrozenModel(Patches(), source="none", **(usual | sizes)).build_student(depth=1)
