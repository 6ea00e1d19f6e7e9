"""Compare design choices: train every row of a study, and print a table.

    python recipes/ablations.py
    python recipes/ablations.py yamls/ablations/timm teacher.checkpoint=FILE
    python recipes/ablations.py yamls/ablations/choices --whole        # on all of CIFAR-10
    python recipes/ablations.py --rows "depth 1" --rows "depth 2"      # and the first row
    python recipes/ablations.py --rows base --jobs 1                   # the first row alone
    python recipes/ablations.py --images /data/cifar --out /mnt/runs/ablations

A study is a folder with base.yaml, a run, and rows.yaml, the changes of each row. Each row is a run of recipes/train.py
in its own folder. If interrupted, its runs save, and the same command resumes them. At the end it prints a table.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import yaml

from d2v_composer.system import command_line
from d2v_composer.system.command_line import d2v, print_next
from d2v_composer.system.errors import InputError
from d2v_composer.system.files import write_atomically
from d2v_composer.system.processes import if_interrupted

if TYPE_CHECKING:
    from d2v_composer.report.tables import FinishedRun

ROOT = Path(__file__).parent.parent
STOP_SECONDS = 60.0
STUDIES = ROOT / "yamls" / "ablations"
DEFAULT_STUDY = str(STUDIES / "data2vec2")


class Study(NamedTuple):
    """Runs to compare."""

    base: Path
    """The YAML that all rows share."""
    rows: Mapping[str, Mapping[str, Any]]
    """Name → changes of ``base``. The first row measures the untrained student and the teacher as well; so does each
    whose encoder or normalization makes them other embeddings."""
    changes: Sequence[str]
    """``key=value`` of all rows."""

    @classmethod
    def read(cls, folder: Path, changes: Sequence[str]) -> "Study":
        """Read a folder.

        Raises:
            InputError: It is not a study, one of its files is malformed, or a change is not ``key=value``.
        """
        for change in changes:
            if "=" not in change:
                raise InputError(f"{change}: must be key=value")
        _read_mapping(folder / "base.yaml")
        rows = _read_mapping(folder / "rows.yaml")
        for name, row in rows.items():
            if not isinstance(name, str) or not isinstance(row, dict):
                raise InputError(f"{folder / 'rows.yaml'}: {name}: a row is its name and {{key: value}}, got {row!r}")
        return cls(folder / "base.yaml", rows, changes)

    def choose(self, names: Sequence[str] | None) -> list[str]:
        """Return the first row and those of ``names``; for ``None``, all rows."""
        for name in names or []:
            if name not in self.rows:
                raise InputError(f"--rows: no such row {name!r} (allowed: {', '.join(self.rows)})")
        first, *others = self.rows
        return [first, *(name for name in others if names is None or name in names)]

    def overrides(self, row: str) -> list[str]:
        """Return the changes of all rows and of one, as ``key=value``; the last of equal keys counts."""
        return [*self.changes, *(f"{key}={json.dumps(value)}" for key, value in self.rows[row].items())]


def _read_mapping(path: Path) -> dict[Any, Any]:
    try:
        contents = yaml.safe_load(path.read_text())
    except OSError as error:
        problem = f"no study, which has base.yaml and rows.yaml ({path.name}: {error.strerror})"
        raise InputError(f"{path.parent}: {problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: not a YAML of keys and values: {' '.join(str(error).split())}") from error
    if not isinstance(contents, dict) or not contents:
        raise InputError(f"{path}: must have keys and values")
    return contents


class Runs:
    """Subprocesses that train, and that stop with this command.

    Args:
        threads: Number of threads of each.
    """

    def __init__(self, threads: int) -> None:
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.started: list[subprocess.Popen[bytes]] = []
        self.is_stopping = False

    def run(self, command: Sequence[str], output: IO[str]) -> int:
        """Run a command, and return its exit status."""
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=self.environment)
        self.started.append(process)
        if self.is_stopping:  # since before it was in the list
            process.terminate()
        status = process.wait()
        if self.is_stopping:
            time.sleep(STOP_SECONDS)  # until this command has ended
        return status

    def stop(self) -> str:
        """Let all save and end, by SIGTERM: a terminal's Ctrl-C reaches them too, and a second one would end them."""
        self.is_stopping = True
        for process in self.started:
            process.terminate()
        for process in self.started:
            process.wait()
        return "the same command resumes"


def main(argv: Sequence[str]) -> "list[FinishedRun]":
    """Train the missing rows, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "study", nargs="?", default=DEFAULT_STUDY, help="folder of the YAMLs; default: yamls/ablations/data2vec2"
    )
    parser.add_argument("changes", nargs="*", help="key=value: changes of all rows")
    parser.add_argument("--images", type=Path, default=Path("datasets"), help="folder of CIFAR-10; default: datasets")
    parser.add_argument(
        "--whole", action="store_true", help="use all of CIFAR-10; default: its first 10,000 + 2,000 images"
    )
    parser.add_argument("--out", type=Path, help="folder of the runs; default: runs/ablations/ and the study's name")
    parser.add_argument("--jobs", type=int, default=2, help="concurrent runs; default: 2")
    parser.add_argument(
        "--rows", action="append", metavar="ROW", help="a name in rows.yaml; repeat it for more; default: all rows"
    )
    arguments = parser.parse_intermixed_args(argv)
    if "=" in arguments.study and not Path(arguments.study).exists():
        arguments.study, arguments.changes = DEFAULT_STUDY, [arguments.study, *arguments.changes]
    if arguments.jobs < 1:
        raise InputError(f"--jobs: must be at least 1, got {arguments.jobs}")
    study = Study.read(Path(arguments.study), arguments.changes)
    chosen = study.choose(arguments.rows)
    out = arguments.out or Path("runs/ablations") / study.base.parent.name

    from d2v_composer.data.convert import convert_cifar10  # takes seconds
    from d2v_composer.report.tables import FinishedRun, study_table

    if arguments.whole:
        images = arguments.images / "cifar10"
        convert_cifar10(arguments.images, images)
    else:
        images = arguments.images / "cifar10_sample"
        convert_cifar10(arguments.images, images, 10_000, 2_000)
    folders = {name: out / name.replace(" ", "_").replace("'", "").replace(",", "") for name in chosen}
    train_rows(study, folders, images, arguments.jobs)
    finished = [FinishedRun.read(name, folder) for name, folder in folders.items()]
    print(study_table(finished))
    print_next(d2v("report", folders[chosen[0]]))
    return finished


def train_rows(study: Study, folders: Mapping[str, Path], images: Path, jobs: int) -> None:
    """Train the rows, ``jobs`` of them at once. A signal stops their runs as well.

    Raises:
        InputError: Some rows failed; the others have finished.
    """
    runs = Runs(max(1, (os.cpu_count() or 1) // jobs))
    problems: list[str] = []
    with ThreadPoolExecutor(jobs) as pool, if_interrupted(runs.stop):
        rows = [pool.submit(train, study, name, folder, images, runs) for name, folder in folders.items()]
        for problem in failures(rows):
            print(f"{problem}; the other rows go on", file=sys.stderr)
            problems.append(problem)
    if problems:
        raise InputError(*problems)


def failures(rows: Sequence[Future[None]]) -> Iterator[str]:
    """Wait for all rows; yield what was wrong with one as soon as it fails."""
    for row in as_completed(rows):
        try:
            row.result()
        except (InputError, OSError) as error:
            yield str(error)


def train(study: Study, row: str, folder: Path, images: Path, runs: Runs) -> None:
    """Train one row in a subprocess."""
    from d2v_composer.report.tables import DATASET

    own = {
        "run_name": folder.name,
        "save_folder": folder,
        "train_loader.local": images / "train",
        f"retrieval.datasets.{DATASET}.root": images,
    }
    changes = [*study.overrides(row), *(f"{key}={value}" for key, value in own.items())]
    command = [sys.executable, str(ROOT / "recipes" / "train.py"), str(study.base), *changes]
    folder.mkdir(parents=True, exist_ok=True)
    refuse_changed(folder / "settings.txt", study.base.read_text() + repr((study.rows[row], study.changes)))
    print(f"{row}: training, its lines go to {folder / 'output.txt'}")
    with (folder / "output.txt").open("a") as output:
        status = runs.run(command, output)
    if status:
        raise InputError(f"{folder.name}: failed with status {status}, see {folder / 'output.txt'}")
    print(f"{row}: finished")


def refuse_changed(path: Path, settings: str) -> None:
    """Refuse a run that was trained with other settings than the row's."""
    if path.exists() and path.read_text() != settings:
        raise InputError(
            f"{path.parent}: was trained with another base.yaml or row: remove it, or choose another --out"
        )
    write_atomically(path, settings)


if __name__ == "__main__":
    command_line.run(main)
