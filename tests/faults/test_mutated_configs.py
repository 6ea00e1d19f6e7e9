"""Each slip in a YAML is accepted as written, or refused in one line before anything is built."""

import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from mutations import Mutation, mutations

from d2v_composer.config.load import load_config, load_evaluate_config, load_finetune_config
from d2v_composer.config.schema import RunConfig
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, ROOT, start_python

# distill.yaml has all keys; the others are read alike.
NUM = {"quickstart": 30, "distill": 120, "ablations": 30, "evaluate": 30, "finetune": 30}
NUM_RUNS = {"quickstart": 2, "distill": 4, "evaluate": 2, "finetune": 1}


class Recipe(NamedTuple):
    """A YAML and its reader."""

    yaml: str
    load: Callable[[list[str]], RunConfig]
    script: str
    changes: Mapping[str, Any]
    """Dotted keys that make it run on a CPU."""


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
FINETUNE = {
    "model": str(GOLDEN / "tiny_base.pt"),
    "precision": "fp32",
    "max_duration": "3ba",
    "global_train_batch_size": 16,
    "save_interval": "2ba",
    "eval_interval": "2ba",
    "train_loader.num_workers": 0,
    "report": False,
}
RECIPES = {
    "quickstart": Recipe("quickstart.yaml", load_config, "train.py", TRAIN),
    "distill": Recipe("distill.yaml", load_config, "train.py", TRAIN),
    "ablations": Recipe("ablations/data2vec2/base.yaml", load_config, "train.py", TRAIN),
    "evaluate": Recipe(
        "evaluate.yaml", load_evaluate_config, "evaluate.py", {"model": str(GOLDEN / "tiny_base.pt"), "ks": [1, 3]}
    ),
    "finetune": Recipe("finetune.yaml", load_finetune_config, "finetune.py", FINETUNE),
}


def small_config(recipe: Recipe, labeled: Path, save_folder: Path) -> dict[str, Any]:
    """Return the recipe's YAML, small enough for a run of seconds."""
    path = ROOT / "yamls" / recipe.yaml
    text = re.sub(r"\$\{here:([^}]*)\}", lambda match: str(path.parent / match[1]), path.read_text())
    config: dict[str, Any] = yaml.safe_load(text)
    places = {} if recipe.script == "evaluate.py" else {"save_folder": str(save_folder)}
    if recipe.script == "train.py":
        places["train_loader.local"] = str(labeled / "train")
    for key, value in {**recipe.changes, **places}.items():
        *sections, name = key.split(".")
        section = config
        for each in sections:
            section = section.setdefault(each, {})
        section[name] = value
    if recipe.script == "finetune.py":
        datasets = config
        names = ["dataset"]
    else:
        datasets = config["retrieval"]["datasets"] if recipe.script == "train.py" else config["datasets"]
        names = list(datasets)
    for name in names:
        datasets[name] = {"format": "mds", "root": str(labeled), "download": False}
    return config


def value_at(config: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = config
    for name in path:
        value = value[name]
    return value


def means(found: Any, written: Any) -> bool:
    """Return whether a config has the values of the YAML; other fields of a section have their defaults."""
    if isinstance(written, Mapping):
        return all(name in found and means(found[name], value) for name, value in written.items())
    if isinstance(found, bool) or isinstance(written, bool):
        return found is written
    if isinstance(found, int | float):
        return found in (written, float(written))
    return found == written or found == str(written)


def refusal(load: Callable[[list[str]], Any], path: Path, mutation: Mutation) -> str | None:
    """Return the line with which a YAML is refused; ``None`` if it is accepted as written."""
    path.write_text(mutation.text)
    try:
        config = asdict(load([str(path)]))
    except InputError as error:
        return str(error)
    if mutation.is_value:
        assert means(value_at(config, mutation.path), mutation.value), mutation
    return None


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("all_slips", [False, pytest.param(True, marks=pytest.mark.campaign)])
def test_each_slip_is_refused_or_accepted_as_written(name: str, all_slips: bool, labeled: Path, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    every = mutations(small_config(recipe, labeled, tmp_path / "run"), None if all_slips else NUM[name])
    accepted = []
    for mutation in every:
        line = refusal(recipe.load, tmp_path / "mutated.yaml", mutation)
        if line is None:
            accepted.append(mutation)
            # Only names of data sets are free: any other misspelt name is refused.
            assert mutation.what not in ("misspelt", "doubled") or "datasets" in mutation.path[:-1], mutation
        else:
            assert "\n" not in line
            # It names the key, or the section that is empty without it.
            assert any(key in line for key in mutation.path), (mutation, line)
    fewest = 0.05 * len(every) if all_slips else 0  # a small sample may have one
    assert fewest < len(accepted) < 0.5 * len(every)
    assert not (tmp_path / "run").exists()


RUN_SECONDS, RUN_BYTES = 60, 16 << 30

# Runs a recipe with little memory, so that a huge value cannot take the machine's.
LIMITED = f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_AS, ({RUN_BYTES}, {RUN_BYTES}))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def try_out(recipe: Recipe, mutation: Mutation, folder: Path, is_long: bool) -> tuple[int | None, list[str]]:
    """Run the recipe with a mutated YAML.

    Returns:
        The exit status, or ``None`` for a run that was stopped: a long one after its first loss, any after a minute.
        And the printed lines.
    """
    folder.mkdir()
    (folder / "mutated.yaml").write_text(mutation.text)
    program = start_python("-c", LIMITED, ROOT / "recipes" / recipe.script, folder / "mutated.yaml", cwd=folder)
    deadline = time.monotonic() + RUN_SECONDS
    while (status := program.poll()) is None and time.monotonic() < deadline:
        if is_long and "loss" in program.stderr:
            break
        time.sleep(0.05)
    program.kill()
    return status, (program.stdout + program.stderr).splitlines()


@pytest.mark.parametrize("name", NUM_RUNS)
@pytest.mark.parametrize("all_slips", [False, pytest.param(True, marks=pytest.mark.campaign)])
def test_an_accepted_slip_runs_or_is_refused(name: str, all_slips: bool, labeled: Path, tmp_path: Path) -> None:
    """An error that only teacher or data can show is one line as well, and leaves nothing behind."""
    recipe, num = RECIPES[name], None if all_slips else NUM_RUNS[name]
    every = mutations(small_config(recipe, labeled, tmp_path / "run"), None if num is None else 10 * num)
    accepted = (each for each in every if refusal(recipe.load, tmp_path / "mutated.yaml", each) is None)
    wrong = []
    for i, mutation in enumerate(islice(accepted, num)):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        is_long = (mutation.what, mutation.path) == ("dropped", ("max_duration",))
        status, lines = try_out(recipe, mutation, tmp_path / str(i), is_long)
        if not is_right(status, lines, left_something=(tmp_path / "run").exists()):
            wrong.append((mutation.what, mutation.path, mutation.value, status, lines[-5:]))
    assert not wrong, "\n".join(map(str, wrong))


def is_right(status: int | None, lines: list[str], left_something: bool) -> bool:
    """Return whether a run succeeded, was refused in one line before it began, or met a loss that is not finite."""
    if status == 1:
        return lines != [] and lines[-1].startswith("FloatingPointError: ")
    if any("Traceback" in line for line in lines):
        return False
    if status == 2:
        return lines != [] and lines[-1].startswith("error: ") and not left_something
    # A long run was stopped.
    return status == 0 or (status is None and any("loss" in line for line in lines))
