"""Train the runs of a study, and print a table that compares their results.

    python recipes/ablations.py
    python recipes/ablations.py yamls/ablations/timm teacher.checkpoint=FILE
    python recipes/ablations.py yamls/ablations/choices --whole        # with all of CIFAR-10
    python recipes/ablations.py --rows "depth 1" --rows "depth 2"      # and the study's first row
    python recipes/ablations.py --images /data/cifar --out /mnt/runs/ablations

A study is a folder with base.yaml, which describes a run, and rows.yaml, in which each row has a name and settings that
replace settings of base.yaml. A row with ``num_images: N`` trains on the first N images of CIFAR-10. Run the same
command again to resume an interrupted study.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from d2v_composer.commands.command import Command, PlaceHere, Positional
from d2v_composer.models.provenance import Json
from d2v_composer.system import command_line
from d2v_composer.system.command_line import d2v, print_next
from d2v_composer.system.errors import InputError, reading
from d2v_composer.system.processes import defer_signals, if_interrupted, obey_signals, received

ROOT = Path(__file__).parent.parent
STUDIES = ROOT / "yamls" / "ablations"
POLL_SECONDS = 0.5


class Ablations(Command):
    given: Positional[tuple[str, ...]] = ()
    """The study's folder (default: yamls/ablations/data2vec2), then settings for all rows, each as key=value."""
    images: PlaceHere = Path("datasets")
    """Folder for CIFAR-10 and its shards; missing files are downloaded."""
    whole: bool = False
    """Use all of CIFAR-10; default: the first 10,000 training and 2,000 test images."""
    out: PlaceHere | None = None
    """Folder for the runs; default: a folder in runs/ablations with the name of the study's folder."""
    rows: tuple[str, ...] | None = None
    """Name of a row to train besides the first row; may be repeated; default: all rows."""

    def run(self) -> None:
        has_study = self.given and "=" not in self.given[0]
        study, changes = (Path(self.given[0]), self.given[1:]) if has_study else (STUDIES / "data2vec2", self.given)
        rows = read_rows(study, self.rows)
        out, datasets = self.out or Path("runs/ablations", study.name), self.images
        folders = {name: out / name.replace(" ", "_") for name in rows}

        from d2v_composer.conversion.convert import convert_cifar10  # takes seconds
        from d2v_composer.evaluation.run_log import read_jsonl
        from d2v_composer.report.tables import study_table

        images = datasets / ("cifar10" if self.whole else "cifar10_sample")
        commands = {name: train_command(study, rows[name], changes, folders[name], images) for name in rows}
        check_rows(commands, folders)
        convert_cifar10(datasets, images, *(() if self.whole else (10_000, 2_000)))
        for row in rows.values():
            if number := row.get("num_images"):
                convert_cifar10(datasets, first_images(images, row), number, 0)
        train_rows(commands, folders)
        print(study_table({name: read_jsonl(folder / "log.jsonl") for name, folder in folders.items()}))
        print_next(d2v("report", next(iter(folders.values()))))


main = Ablations.main


def read_rows(study: Path, names: Sequence[str] | None = None) -> dict[str, Mapping[str, Json]]:
    """Read the first row of a study and the rows in ``names``; or, if ``names`` is ``None``, all rows.

    Returns:
        Name of a row → its settings, in the order of the file.

    Raises:
        InputError: The folder is not a study, or has no row with one of the names.
    """
    from d2v_composer.config.load import read_yaml  # takes seconds

    path = study / "rows.yaml"
    rows = read_yaml(path)
    if not rows or not all(isinstance(name, str) and isinstance(row, dict) for name, row in rows.items()):
        expected = "'name: {key: value}' for each row, with quotes around a name that is a number"
        raise InputError(f"{path}: expected a line {expected}")
    for name, row in rows.items():
        if not isinstance(number := row.get("num_images", 1), int):
            raise InputError(f"{path}: {name}: num_images must be a whole number, got {number!r}")
    chosen = [next(iter(rows)), *(rows if names is None else names)]
    for name in chosen:
        if name not in rows:
            raise InputError(f"--rows: no such row {name!r} (allowed: {', '.join(rows)})")
    return {name: row for name, row in rows.items() if name in chosen}


def check_rows(commands: Mapping[str, Sequence[str]], folders: Mapping[str, Path]) -> None:
    """Check that the runs that an earlier call began have the same settings as in this call.

    Raises:
        InputError: A setting differs.
    """
    from d2v_composer.config.load import load_config
    from d2v_composer.runs.trainer import build_run_record

    for row, (_, _, *arguments) in commands.items():
        if (path := folders[row] / "run.yaml").exists():
            with reading(path):
                before, record = yaml.safe_load(path.read_text()), build_run_record(load_config(arguments))
                if changes := record.changes(before, ["config"]):
                    raise InputError(f"{row}: {changes}; choose another --out, or remove {folders[row]}")


def train_rows(commands: Mapping[str, Sequence[str]], folders: Mapping[str, Path]) -> None:
    """Train the rows one after another, each in a subprocess.

    Raises:
        InputError: A row failed. The error is raised after the last row.
    """
    problems = []
    for row, command in commands.items():
        output = folders[row].with_name(f"{folders[row].name}.txt")
        print(f"{row}: training; the output goes to {output}")
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("a") as file, if_interrupted(lambda: "the same command resumes"):
            defer_signals()
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            while process.poll() is None:
                if received() is not None:
                    process.terminate()  # once more does not hurt, and a second Ctrl-C would end it at once
                time.sleep(POLL_SECONDS)
            obey_signals()
        if process.returncode:
            problems.append(f"{row}: failed with status {process.returncode}; see {output}")
            print(f"{problems[-1]}; continuing with the other rows", file=sys.stderr)
        else:
            print(f"{row}: finished")
    if problems:
        raise InputError(*problems)


def train_command(
    study: Path, row: Mapping[str, Json], changes: Sequence[str], folder: Path, images: Path
) -> list[str]:
    """Return the command that trains or resumes a row; the row's settings replace those in ``changes``."""
    settings = {
        "run_name": folder.name,
        "save_folder": folder.with_name("{run_name}"),
        "train_loader.local": first_images(images, row) / "train",
        "retrieval.embeddings": "all",
        "retrieval.datasets.cifar10.root": images,
    }
    base, overrides = str(study / "base.yaml"), [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, str(ROOT / "recipes" / "train.py"), base, *changes, *as_overrides(row), *overrides]


def first_images(images: Path, row: Mapping[str, Json]) -> Path:
    """Return the folder of the images that a row trains on."""
    return images.with_name(f"cifar10_{row['num_images']}") if "num_images" in row else images


def as_overrides(row: Mapping[str, Json]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in row.items() if key != "num_images"]


if __name__ == "__main__":
    command_line.run(main)
