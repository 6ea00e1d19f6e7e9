"""The wheel works in an environment that has nothing of the checkout."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

import d2v_composer
from d2v_composer import load_teacher
from d2v_composer.checkpoints.load import save_student
from helpers import GOLDEN, ROOT, write_images

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command outside the checkout and without what points to it, and return its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the checkout's files."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("d2v_composer", "recipes", "tests", "yamls"):
        ignored = shutil.ignore_patterns("__pycache__", "golden")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with the wheel; its dependencies are this environment's."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    Path(packages, "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_the_wheel_holds_the_package_and_no_tests(wheel: Path) -> None:
    files = [path for path in (ROOT / "d2v_composer").rglob("*") if path.is_file()]
    expected = {str(path.relative_to(ROOT)) for path in files if path.name != "README.md" and path.suffix != ".pyc"}
    yamls = [*(ROOT / "yamls").glob("*.yaml"), *(ROOT / "yamls").glob("quickstart*/**/*")]
    files = [path for path in yamls if path.is_file() and path.suffix not in (".md", ".py", ".pyc")]
    expected |= {f"d2v_composer/{path.relative_to(ROOT)}" for path in files}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == expected


def test_the_command_embeds_a_folder(python: Path, tmp_path: Path) -> None:
    command = python.with_name("d2v")
    assert "embed" in run(command, "--help", cwd=tmp_path)
    assert run(command, "--version", cwd=tmp_path) == f"d2v-composer {d2v_composer.__version__}\n"
    save_student(load_teacher(GOLDEN / "tiny_base.pt").build_student(depth=1), tmp_path / "student.safetensors")
    write_images(tmp_path / "photos", [f"{i}.jpg" for i in range(3)])
    run(command, "embed", "student.safetensors", "photos", "photos.npy", "--workers", "0", cwd=tmp_path)
    embeddings = np.load(tmp_path / "photos.npy")
    assert embeddings.shape == (3, 48)
    assert len({tuple(row) for row in embeddings.tolist()}) == 3
    (teacher,) = re.findall('checkpoint: "(.*)"', run(command, "init", "quickstart", cwd=tmp_path))
    assert Path(teacher).is_file()
    assert not Path(teacher).is_relative_to(ROOT)
    said = run(command, "convert-images", "photos", "mds", "--labels", "none", cwd=tmp_path)
    first, second = [line.removeprefix("next: ") for line in said.splitlines() if line.startswith("next: ")]
    run("sh", "-c", first, cwd=tmp_path)
    assert second.endswith(f" train distill.yaml train_loader.local={tmp_path / 'mds'}")
    assert (tmp_path / "distill.yaml").is_file()
