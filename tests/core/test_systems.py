"""The core's commands run without the extra 'train'; CI runs this file on Linux, macOS and Windows."""

import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml

from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.load import save_student
from helpers import GOLDEN, QUICKSTART, ROOT, command_environment, failure, write_files, write_images

LIGHT = ROOT / "tests" / "programs" / "light.py"
RECORD = {
    "config": {"run_name": "né", "max_duration": "2ba", "retrieval": {"datasets": {}, "max_images": None}},
    "command": "composer recipes/train.py",
    "hardware": {"ranks": 1, "cpu": "a CPU", "gpu": ""},
    "data": {"modality": "image"},
}


def run_core(folder: Path) -> str:
    """Run each command in a folder, in one process; the last needs the extra, and says so. Return what they print."""
    losses = b'{"step": 0, "loss/train/total": 1}\n{"step": 1, "loss/train/total": 0.5}\n'
    write_files(folder / "run", {"run.yaml": yaml.safe_dump(RECORD, allow_unicode=True).encode(), "log.jsonl": losses})
    datasets = f"datasets={{small: {{format: mds, root: {(QUICKSTART / 'cifar10').as_posix()}}}}}"
    commands = [
        ["convert-teacher", (GOLDEN / "tiny_base.pt").as_posix(), "teacher.safetensors"],
        ["embed", "teacher.safetensors", "../photos", "photos.npy", "--workers", "2", "--batch-size", "4"],
        ["evaluate", "model=../student.safetensors", "max_images=40", datasets, "out=evaluation"],
        ["report", "run"],
        ["init", "evaluate"],
        ["export", "../student.safetensors", "student.safetensors"],
        ["convert-images", "../photos", "shards"],
    ]
    if (checkpoint := folder.parent / "checkpoint.pt").exists():
        commands.insert(-1, ["export", checkpoint.as_posix(), "of_checkpoint.safetensors"])
    ended = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", LIGHT],
        input="\n".join(map(shlex.join, commands)),
        capture_output=True,
        encoding="utf-8",
        cwd=folder,
        env=command_environment(),
        timeout=300,
    )
    assert failure(ended, 2) == "error: No module named 'streaming': pip install 'd2v-composer[train]'"
    return ended.stdout


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Return the folder of what the commands write on this system, beside what they read."""
    root = tmp_path_factory.mktemp("core")
    if find_spec("composer") is not None:  # which trains; what it saved needs no Composer
        shutil.copy(request.getfixturevalue("uninterrupted") / "latest-rank0.pt", root / "checkpoint.pt")
    write_images(root / "photos", [f"{i}.jpg" for i in range(10)])
    save_student(load_teacher(GOLDEN / "tiny_base.pt").build_student(depth=1), root / "student.safetensors")
    (root / "here").mkdir()
    imported = re.findall(r"^imported: ?(.*)$", run_core(root / "here"), re.MULTILINE)
    assert imported[:5] == [*["torch"] * 2, *["matplotlib torch"] * 3]  # from convert-teacher to init
    return root / "here"


@pytest.mark.slow
def test_the_commands_compute_what_the_models_do(here: Path) -> None:
    embeddings, teacher = np.load(here / "photos.npy"), load_teacher(GOLDEN / "tiny_base.pt")
    assert embeddings.shape == (10, teacher.embed_dim)
    assert np.isfinite(embeddings).all()
    assert np.load(here / "photos.ids.npy").tolist() == [f"{i}.jpg" for i in range(10)]
    student = load_student(here / "student.safetensors")
    assert student.state_dict().keys() == load_student(here.parent / "student.safetensors").state_dict().keys()
    assert not (here.parent / "checkpoint.pt").exists() or load_student(here / "of_checkpoint.safetensors")
    assert "né" in (here / "run" / "report.html").read_text("utf-8")
    assert not (here / "run" / "report.html").read_bytes().count(b"\xc3\x83")  # UTF-8 that was read as Latin-1
