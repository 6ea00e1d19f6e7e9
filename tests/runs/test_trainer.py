"""Parts of a run: parameter groups, the schedule, clipping, and a record that shows no password."""

import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock, patch

import pytest
import torch
import yaml
from composer.core import Event, State, Time, Timestamp
from torch import nn

from d2v_composer.config.load import defaults, load_checked, load_config
from d2v_composer.config.schema import (
    AlgorithmsConfig,
    OptimizerConfig,
    RunConfig,
    SchedulerConfig,
    TrainConfig,
    TrainerConfig,
)
from d2v_composer.runs.trainer import build_algorithms, build_optimizer, build_run_record, build_scheduler
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, QUICKSTART, ROOT

BATCHES_PER_EPOCH = 6


@pytest.mark.parametrize(("decay_norms_and_biases", "of_vectors"), [(False, 0.0), (True, 0.1)])
def test_weight_decay_spares_norms_and_biases_unless_asked(decay_norms_and_biases: bool, of_vectors: float) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 2))
    model[2].requires_grad_(False)
    config = OptimizerConfig(weight_decay=0.1, decay_norms_and_biases=decay_norms_and_biases)
    groups = build_optimizer(config, model).param_groups
    decay = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
    expected = {"0.weight": 0.1, "0.bias": of_vectors, "1.weight": of_vectors, "1.bias": of_vectors}
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert {names[weight]: value for weight, value in decay.items()} == expected


@pytest.mark.parametrize(("name", "shrunk"), [("adamw", 1 - 0.1 * 0.5), ("decoupled_adamw", 1 - 0.1)])
def test_an_optimizer_decays_as_its_field_says(name: str, shrunk: float) -> None:
    """Without a gradient, a step does nothing else."""
    model = nn.Linear(2, 2, bias=False)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(OptimizerConfig(name=name, lr=0.5, weight_decay=0.1), model)
    model.weight.grad = torch.zeros(2, 2)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), shrunk * before)


def learning_rates(max_duration: str, t_warmup: str, num_batches: int) -> list[float]:
    """The factors of the learning rate at the first batches; a warning would fail the test."""
    config = TrainerConfig(max_duration=max_duration, scheduler=SchedulerConfig(t_warmup=t_warmup))
    scheduler = build_scheduler(config, BATCHES_PER_EPOCH)
    lengths = {"max_duration": Time.from_timestring(max_duration), "dataloader_len": Time.from_batch(BATCHES_PER_EPOCH)}
    times = [Timestamp(epoch=batch // BATCHES_PER_EPOCH, batch=batch) for batch in range(num_batches)]
    return [scheduler(cast("State", SimpleNamespace(timestamp=time, **lengths))) for time in times]


@pytest.mark.parametrize("max_duration", ["12ba", "2ep"])
@pytest.mark.parametrize(("t_warmup", "num_batches"), [("3ba", 3), ("0.25dur", 3), ("1ep", 6)])
def test_a_warmup_rises_for_its_batches_epochs_or_share_of_the_run(
    max_duration: str, t_warmup: str, num_batches: int
) -> None:
    rising = [batch / num_batches for batch in range(num_batches + 1)]
    assert learning_rates(max_duration, t_warmup, num_batches + 1) == pytest.approx(rising)


def test_a_short_run_needs_no_warmup() -> None:
    assert learning_rates("4ba", "0.1dur", 4) == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_a_warmup_is_not_longer_than_the_run_in_other_units_either() -> None:
    with pytest.raises(InputError, match=r"2ep, got 13ba with 6 batches per epoch; scheduler.t_warmup=0\.1dur"):
        learning_rates("2ep", "13ba", 1)
    assert learning_rates("2ep", "12ba", 2) == pytest.approx([0, 1 / 12])


@pytest.mark.parametrize(("gradient", "clipped"), [(0.5, 0.5), (10.0, 2 / 6**0.5)])
def test_clipping_is_by_the_norm_of_all_that_is_trained(gradient: float, clipped: float) -> None:
    """2, of six weights that two optimizers share."""
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    for weight in weights:
        weight.grad = torch.full((2,), gradient)
    state: Any = SimpleNamespace(optimizers=[torch.optim.SGD(weights[:2]), torch.optim.SGD(weights[2:])])
    build_algorithms(AlgorithmsConfig())[0].apply(Event.AFTER_TRAIN_BATCH, state, Mock())
    for weight in weights:
        torch.testing.assert_close(weight.grad, torch.full((2,), clipped))


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


def shown(schema: type[RunConfig], argv: list[str]) -> tuple[bool, str]:
    """Return whether a config takes its arguments; with its run's record, or the error."""
    try:
        config: Any = load_checked(schema, argv)
    except InputError as error:
        return False, str(error)
    with patch.object(sys, "argv", ["recipes/train.py", *argv]):
        record = build_run_record(config, data={"location": config.train_loader.remote}).record
        assert argv[-1].partition("=")[0] in record["command"]
        return True, yaml.safe_dump(record, width=1 << 20) + json.dumps([record, sys.argv])


def test_no_field_gives_a_secret_away() -> None:
    taken = set()
    for key in [*keys_of(defaults(TrainConfig)), "teacher.checkpoint", *LOGGERS]:
        for address in ADDRESSES[: 1 if key == "run_name" else None]:
            argv = [str(ROOT / "yamls/quickstart.yaml"), f"{key}={json.dumps(address)}"]
            is_taken, text = shown(TrainConfig, argv)
            taken |= {key} if is_taken else set()
            assert not [part for part in PARTS if part in text], f"{key}={address}: {text}"
    assert taken >= {"teacher.checkpoint", "train_loader.remote", "load_path", *LOGGERS}


def test_a_relative_path_of_a_teacher_is_found_from_any_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The record of a run keeps it."""
    monkeypatch.chdir(GOLDEN)
    config = load_config([str(QUICKSTART.with_suffix(".yaml")), "teacher.checkpoint=tiny_base.pt"])
    assert config.teacher.checkpoint == str(GOLDEN / "tiny_base.pt")
