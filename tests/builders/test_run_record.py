"""Every field of a YAML may hold an address with a password: neither a run's record nor an error shows it."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from d2v_composer.builders.trainer import build_run_record
from d2v_composer.config.load import defaults, load_checked
from d2v_composer.config.schema import FinetuneConfig, RunConfig, TrainConfig
from d2v_composer.system.errors import InputError
from helpers import QUICKSTART, ROOT

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
