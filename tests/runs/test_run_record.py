"""Every field of a YAML may hold an address with a password: neither a run's record nor an error shows it."""

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from d2v_composer.config.load import defaults, load_checked, load_config
from d2v_composer.config.schema import FinetuneConfig, RunConfig, TrainConfig
from d2v_composer.objectives.tokens import LayerRegression
from d2v_composer.runs.distill import FIXED_BY_A_CHECKPOINT, train_student
from d2v_composer.runs.trainer import build_run_record
from d2v_composer.system.errors import InputError
from helpers import QUICKSTART, ROOT, small_run

LOGGERS = ["loggers.mlflow.tracking_uri", "loggers.mlflow.tags.a", "loggers.wandb.init_kwargs.settings.base_url"]
ADDRESSES = ["https://user:hunter\"\\'2top@host/file?key=secret3", "user:hunter\"\\'2top@host/file"]
PARTS = ("hunter", "2top", "secret3")


def keys_of(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a config's values."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from keys_of(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


@pytest.mark.parametrize(
    ("schema", "given", "required", "expected"),
    [
        (TrainConfig, ["quickstart.yaml"], ["teacher.checkpoint"], {"teacher.checkpoint"}),
        (
            FinetuneConfig,
            ["finetune.yaml", f"model={QUICKSTART / 'teacher.safetensors'}"],
            ["dataset.root", "model"],
            {"model", "checkpoint", "teacher"},
        ),
    ],
)
def test_no_field_gives_a_secret_away(
    schema: type[RunConfig],
    given: list[str],
    required: list[str],
    expected: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = set()
    for key in [*keys_of(defaults(schema)), *required, *LOGGERS]:
        for address in ADDRESSES[: 1 if key == "run_name" else None]:
            argv = [str(ROOT / "yamls" / given[0]), *given[1:], f"{key}={json.dumps(address)}"]
            try:
                config: Any = load_checked(schema, argv)
            except InputError as error:
                shown = str(error)
            else:
                taken.add(key)
                monkeypatch.setattr(sys, "argv", ["recipes/train.py", *argv])
                record = build_run_record(config, (), data={"location": config.train_loader.remote}).record
                shown = yaml.safe_dump(record, width=1 << 20) + json.dumps([record, sys.argv])
                assert key in record["command"]
            assert not [part for part in PARTS if part in shown], f"{key}={address}: {shown}"
    assert taken >= {*expected, "train_loader.remote", "load_path", *LOGGERS}


@pytest.mark.parametrize(("weight", "is_same"), [(0.0, True), (1.0, False)])
def test_a_run_from_before_an_objective_goes_on_without_it(weight: float, is_same: bool) -> None:
    argv = [str(ROOT / "yamls/quickstart.yaml"), f"objectives.embedding.weight={weight}"]
    record = build_run_record(load_checked(TrainConfig, argv), FIXED_BY_A_CHECKPOINT)
    earlier = copy.deepcopy(record.record)
    del earlier["config"]["objectives"]["embedding"], earlier["config"]["objectives"]["tokens"]["cls_weight"]
    expected = "" if is_same else "objectives.embedding.weight: checkpoint has 0.0, config has 1.0"
    assert record.changes(earlier) == expected


def test_a_loss_that_compares_inputs_keeps_its_microbatches(
    tmp_path: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LayerRegression, "compares", "microbatch")
    arguments = small_run(tmp_path / "run", small_data, "max_duration=2ba", "scheduler.t_warmup=0ba")
    train_student(load_config(arguments))
    with pytest.raises(InputError, match="device_train_microbatch_size: checkpoint has None, config has 2"):
        train_student(load_config([*arguments, "max_duration=3ba", "device_train_microbatch_size=2"]))
