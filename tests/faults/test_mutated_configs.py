"""Every slip of a hand in every YAML is accepted for what it says, or refused in one line before anything is built."""

import multiprocessing
import os
import re
import resource
import runpy
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from mutations import Mutation, mutations

from d2v_composer.config.load import load_config, load_evaluate_config
from d2v_composer.config.schema import EvaluateConfig, TrainConfig
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, ROOT

NUM = 300


class Recipe(NamedTuple):
    """A YAML, and what reads it."""

    yaml: str
    load: Callable[[list[str]], TrainConfig | EvaluateConfig]
    script: str
    changes: Mapping[str, Any]
    """What it takes to run on a CPU, with dotted keys."""


TRAIN = {
    "teacher.checkpoint": str(GOLDEN / "tiny_base.pt"),
    "precision": "fp32",
    "compile": False,
    "max_duration": "3ba",
    "global_train_batch_size": 16,
    "device_train_microbatch_size": 8,
    "device_eval_batch_size": 64,
    "scheduler.t_warmup": "2ba",
    "save_interval": "2ba",
    "retrieval.interval": "2ba",
    "train_loader.num_workers": 0,
    "report": False,
}
RECIPES = {
    "quickstart": Recipe("quickstart.yaml", load_config, "train.py", TRAIN),
    "distill": Recipe("distill.yaml", load_config, "train.py", TRAIN),
    "ablations": Recipe("ablations/base.yaml", load_config, "train.py", TRAIN),
    "evaluate": Recipe(
        "evaluate.yaml", load_evaluate_config, "evaluate.py", {"model": str(GOLDEN / "tiny_base.pt"), "ks": [1, 3]}
    ),
}


def small_config(recipe: Recipe, labelled: Path, save_folder: Path) -> dict[str, Any]:
    """The recipe's YAML, small enough for a run of seconds."""
    path = ROOT / "yamls" / recipe.yaml
    text = re.sub(r"\$\{here:([^}]*)\}", lambda match: str(path.parent / match[1]), path.read_text())
    config: dict[str, Any] = yaml.safe_load(text)
    places = {}
    if recipe.script == "train.py":
        places = {"train_loader.local": str(labelled / "train"), "save_folder": str(save_folder)}
    for key, value in {**recipe.changes, **places}.items():
        *sections, name = key.split(".")
        section = config
        for each in sections:
            section = section.setdefault(each, {})
        section[name] = value
    datasets = config["retrieval"]["datasets"] if recipe.script == "train.py" else config["datasets"]
    for name in datasets:
        datasets[name] = {"format": "mds", "root": str(labelled), "download": False}
    return config


def value_at(config: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = config
    for name in path:
        value = value[name]
    return value


def means(found: Any, written: Any) -> bool:
    """Whether a config has what the YAML says; a section's other fields have their defaults."""
    if isinstance(written, Mapping):
        return all(name in found and means(found[name], value) for name, value in written.items())
    if isinstance(found, bool) or isinstance(written, bool):
        return found is written
    if isinstance(found, int | float):
        return found in (written, float(written))
    return found == written or found == str(written)


def refusal(load: Callable[[list[str]], Any], path: Path, mutation: Mutation) -> str | None:
    """The one line with which a YAML is refused; ``None``: it is accepted, and means what it says."""
    path.write_text(mutation.text)
    try:
        config = asdict(load([str(path)]))
    except InputError as error:
        return str(error)
    if mutation.is_value:
        assert means(value_at(config, mutation.path), mutation.value), mutation
    return None


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("num", [NUM, pytest.param(None, marks=pytest.mark.campaign)])
def test_each_slip_is_refused_or_meant(name: str, num: int | None, labelled: Path, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    every = mutations(small_config(recipe, labelled, tmp_path / "run"), num)
    accepted = []
    for mutation in every:
        line = refusal(recipe.load, tmp_path / "mutated.yaml", mutation)
        if line is None:
            accepted.append(mutation)
            # A misspelt name is only one where names are free: that of a data set.
            assert mutation.what not in ("misspelt", "doubled") or "datasets" in mutation.path[:-1], mutation
        else:
            assert "\n" not in line
            # It names the key; or the section that is empty without it.
            assert any(key in line for key in mutation.path), (mutation, line)
    assert 0.05 * len(every) < len(accepted) < 0.5 * len(every)  # neither lets everything pass nor refuses it all
    assert not (tmp_path / "run").exists()


# What holds a run up, and a machine: none of them may take longer, or more.
RUN_SECONDS, RUN_BYTES = 60, 16 << 30


def run_recipe(script: str, arguments: list[str], output: Path, folder: Path) -> None:
    """A recipe as the command runs it, in this process, which is one for it alone."""
    os.chdir(folder)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [script, *arguments]
    resource.setrlimit(resource.RLIMIT_AS, (RUN_BYTES, RUN_BYTES))
    runpy.run_path(str(ROOT / "recipes" / script), run_name="__main__")


def try_out(recipe: Recipe, mutation: Mutation, folder: Path) -> tuple[int | None, list[str]]:
    """Run the recipe with a mutated YAML: the status, or None where it had to be stopped; and what it printed."""
    folder.mkdir()
    (folder / "mutated.yaml").write_text(mutation.text)
    arguments = [str(folder / "mutated.yaml")]
    process = SERVER.Process(target=run_recipe, args=(recipe.script, arguments, folder / "output.txt", folder))
    process.start()
    process.join(RUN_SECONDS)
    status = process.exitcode
    process.kill()
    process.join()
    return status, (folder / "output.txt").read_text(errors="replace").splitlines()


# Forks of one process that has loaded everything, and started no thread.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["d2v_composer.builders.model", "d2v_composer.report", "d2v_composer.evaluation.evaluate"]
)


@pytest.mark.parametrize("name", ["quickstart", "distill", "evaluate"])
@pytest.mark.parametrize("num", [6, pytest.param(None, marks=pytest.mark.campaign)])
def test_what_is_accepted_runs_or_is_refused(name: str, num: int | None, labelled: Path, tmp_path: Path) -> None:
    """What only the teacher or the data can show to be wrong is one line as well, and nothing is left behind."""
    recipe = RECIPES[name]
    every = mutations(small_config(recipe, labelled, tmp_path / "run"), None if num is None else 10 * num)
    accepted = (each for each in every if refusal(recipe.load, tmp_path / "mutated.yaml", each) is None)
    wrong = []
    for i, mutation in enumerate(islice(accepted, num)):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        status, lines = try_out(recipe, mutation, tmp_path / str(i))
        if not is_right(status, lines, left_something=(tmp_path / "run").exists()):
            wrong.append((mutation.what, mutation.path, mutation.value, status, lines[-5:]))
    assert not wrong, "\n".join(map(str, wrong))


def is_right(status: int | None, lines: list[str], left_something: bool) -> bool:
    """Whether a run ended well, or with one line before it began, or with what the numbers came to."""
    if status == 1:
        return lines != [] and lines[-1].startswith("FloatingPointError: ")
    if any("Traceback" in line for line in lines):
        return False
    if status == 2:
        return lines != [] and lines[-1].startswith("error: ") and not left_something
    # A run of 2147483647 batches has to be stopped.
    return status == 0 or (status is None and any("loss" in line for line in lines))
