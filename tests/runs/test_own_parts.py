"""A run from Python with a loader, algorithms and loggers of one's own; callbacks that installed packages offer."""

import sys
from pathlib import Path
from typing import Any

import pytest
from composer.core import Algorithm, Event, State
from composer.loggers import InMemoryLogger, Logger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from d2v_composer import load_config, train_student
from helpers import map_of, run_command, small_run, succeed, train_command
from steps import random_images


class Images(Dataset[Tensor]):
    """48 images."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, number: int) -> Tensor:
        return random_images(48)[number]


class Counter(Algorithm):
    """Counts the batches it sees, across a resume."""

    def __init__(self) -> None:
        self.batches = 0

    def match(self, event: Event, state: State) -> bool:
        return event == Event.BATCH_END

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]


def train(folder: Path, *overrides: str, **parts: Any) -> None:
    """Train on 48 images with a loader of one's own."""
    config = load_config(small_run(folder, folder / "unread", "max_duration=4ba", *overrides))
    train_student(config, train_dataloader=DataLoader(Images(), 16), **parts)


def test_it_trains_resumes_and_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, counter, memory = tmp_path / "run", Counter(), InMemoryLogger()
    parts = {"algorithms": [counter], "loggers": [memory], "alignment_samples": Images()}
    train(folder, **parts)
    assert "estimated by an alignment" in capsys.readouterr().out
    assert len(memory.data["loss/train/total"]) == counter.batches == 4
    assert map_of(folder)["about"]["pairs"] == 48
    resumed = Counter()
    train(folder, "max_duration=6ba", **parts | {"algorithms": [resumed]})
    assert resumed.batches == 6
    succeed("export", folder / "latest-rank0.pt", tmp_path / "student.safetensors")


def test_without_samples_there_is_no_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run")
    assert "from train_dataloader; no alignment without alignment_samples" in capsys.readouterr().out
    assert map_of(tmp_path / "run") == {}


# Runs a program in an environment where packages are installed.
INSTALLED = """
import runpy, sys
folders, sys.argv[:] = sys.argv[1].split(":"), sys.argv[2:]
sys.path += folders
runpy.run_path(sys.argv[0], run_name="__main__")
"""
MODULE = """
from pathlib import Path
from composer import Callback

class Note(Callback):
    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def fit_end(self, state, logger) -> None:
        self.path.write_text(str(state.timestamp.batch.value))
"""


def install(folder: Path, package: str, *offers: str) -> Path:
    """Make a folder with an installed package that offers callbacks, given as NAME = MODULE:OBJECT."""
    about = folder / f"{package}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("\n".join(["[d2v_composer.callbacks]", *offers]))
    (folder / f"{package}.py").write_text(MODULE)
    return folder


def installed_run(folders: list[Path], arguments: list[str]) -> Any:
    path = ":".join(map(str, folders))
    return run_command(sys.executable, "-c", INSTALLED, path, *train_command(arguments)[1:])


def test_a_yaml_names_a_packages_callback(tmp_path: Path, small_data: Path) -> None:
    package, note = install(tmp_path / "one", "ours", "note = ours:Note"), tmp_path / "note"
    settings = small_run(tmp_path / "run", small_data, "max_duration=2ba", "scheduler.t_warmup=0ba")
    chosen = f"callbacks={{ext/note: {{path: {note}}}}}"
    ended = installed_run([package], [*settings, chosen])
    assert ended.returncode == 0, ended.stderr
    assert note.read_text() == "2"
    other = install(tmp_path / "two", "theirs", "note = theirs:Note")
    for folders, override, problem in [
        ([], chosen, "callbacks.ext/note: no such name (allowed: health, "),
        (
            [package, other],
            chosen,
            "callbacks: ours (ours:Note) and theirs (theirs:Note) provide the entry point 'note'",
        ),
        ([package], "callbacks={ext/note: {paht: a}}", "callbacks.ext/note.paht: no such argument; did you mean path?"),
    ]:
        refused = installed_run(folders, [*settings, override, f"save_folder={tmp_path}/refused"])
        assert refused.returncode == 2, refused.stderr
        assert problem in refused.stderr.splitlines()[-1]
    assert not (tmp_path / "refused").exists()
