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

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from d2v_composer.system import command_line
from d2v_composer.system.command_line import d2v, make_parser, print_next
from d2v_composer.system.errors import InputError, reading
from d2v_composer.system.processes import if_interrupted

ROOT = Path(__file__).parent.parent
STUDIES = ROOT / "yamls" / "ablations"
DEFAULT_STUDY = str(STUDIES / "data2vec2")
POLL_SECONDS = 0.5


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
            InputError: It is not a study.
        """
        path = folder / "rows.yaml"
        with reading(path):
            rows = yaml.safe_load(path.read_text())
        if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
            raise InputError(f"{path}: expected a line 'name: {{key: value}}' per row")
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


def main(argv: Sequence[str]) -> None:
    """Train the missing rows, and print the table."""
    parser = make_parser(__doc__)
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
    study = Study.read(Path(arguments.study), arguments.changes)
    chosen = study.choose(arguments.rows)
    out = arguments.out or Path("runs/ablations") / study.base.parent.name
    folders = {name: out / name.replace(" ", "_").replace("'", "").replace(",", "") for name in chosen}

    from d2v_composer.data.convert import convert_cifar10  # takes seconds
    from d2v_composer.evaluation.metrics import read_jsonl
    from d2v_composer.report.tables import study_table

    images = arguments.images / ("cifar10" if arguments.whole else "cifar10_sample")
    convert_cifar10(arguments.images, images, *(() if arguments.whole else (10_000, 2_000)))
    train_rows(study, folders, images, max(1, arguments.jobs))
    logs = {}
    for name, folder in folders.items():
        with reading(folder / "log.jsonl"):
            logs[name] = read_jsonl(folder / "log.jsonl")
    print(study_table(logs))
    print_next(d2v("report", folders[chosen[0]]))


def train_rows(study: Study, folders: Mapping[str, Path], images: Path, jobs: int) -> None:
    """Train the rows, ``jobs`` of them at once, each in a subprocess. A signal lets them save and stops them as well.

    Raises:
        InputError: Some rows failed; the others have finished.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    running, problems = list[subprocess.Popen[bytes]](), list[str]()
    is_stopping = threading.Event()

    def stop() -> str:
        is_stopping.set()
        time.sleep(POLL_SECONDS)  # a run that is being started is among the running ones then
        for process in running:  # by SIGTERM: a second Ctrl-C would end them at once
            process.terminate()
        for process in running:
            process.wait()
        return "the same command resumes"

    def train(row: str) -> None:
        if is_stopping.is_set():
            return
        output = folders[row] / "output.txt"
        print(f"{row}: training, its lines go to {output}")
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("a") as file:
            command = train_command(study, row, folders[row], images)
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        running.append(process)
        status = process.wait()
        if is_stopping.is_set():
            return
        if status:
            problems.append(f"{row}: failed with status {status}, see {output}")
            print(f"{problems[-1]}; the other rows go on", file=sys.stderr)
        else:
            print(f"{row}: finished")

    with if_interrupted(stop):
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(train, folders))
        while is_stopping.is_set():
            time.sleep(POLL_SECONDS)  # until this command ends
    if problems:
        raise InputError(*problems)


def train_command(study: Study, row: str, folder: Path, images: Path) -> list[str]:
    """Return the command that trains a row, or resumes it; the checkpoint refuses what a run must not change."""
    from d2v_composer.report.tables import DATASET

    own = {
        "run_name": folder.name,
        "save_folder": folder,
        "train_loader.local": images / "train",
        f"retrieval.datasets.{DATASET}.root": images,
    }
    changes = [*study.overrides(row), *(f"{key}={value}" for key, value in own.items())]
    return [sys.executable, str(ROOT / "recipes" / "train.py"), str(study.base), *changes]


if __name__ == "__main__":
    command_line.run(main)
