"""Health: the measurements, and a warning for each state and no other."""

import logging
import math
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from composer import Callback, ComposerModel, Logger, State
from composer.loggers import InMemoryLogger
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.utils.data import DataLoader

from d2v_composer.callbacks.health import Health
from d2v_composer.evaluation.run_log import HEALTH_STATES, read_jsonl
from d2v_composer.objectives.objective import Regression
from d2v_composer.objectives.tokens import regression_loss
from foreign_models import fit
from helpers import small_run
from recipes import train as train_recipe

NUM_BATCHES = 20


class Regressor(ComposerModel):
    """Predicts its batch, multiplied and shifted, plus an error for each batch."""

    def __init__(self, scale: float = 1.0, shift: float = 0.0, errors: dict[int, float] | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.shift = shift
        self.errors = errors or {}
        self.num_batches = 0

    def forward(self, batch: Tensor) -> Regression:
        error = self.errors.get(self.num_batches, 0.1)
        self.num_batches += 1
        return Regression(self.scale * batch + self.shift + error, batch)

    def loss(self, outputs: Regression, batch: Tensor) -> Tensor:
        return regression_loss(outputs)


def train(model: ComposerModel, *callbacks: Callback, batch_size: int = 8) -> dict[str, list[float]]:
    """Run twenty batches of 5 × 16 normal numbers each without learning, and return the logged health."""
    batches = torch.randn(NUM_BATCHES * batch_size, 5, 16, generator=torch.Generator().manual_seed(0))
    logger = InMemoryLogger()
    loader = DataLoader(list(batches), batch_size)  # pyright: ignore[reportArgumentType]: a list will do
    fit(model, loader, f"{NUM_BATCHES}ba", lr=0.0, callbacks=list(callbacks), loggers=[logger])
    return {
        key.removeprefix("health/"): [value for _, value in values]
        for key, values in logger.data.items()
        if key.startswith("health/")
    }


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.message for record in caplog.records if record.levelno == logging.WARNING and "health" in record.name
    ]


def test_a_healthy_run_has_no_warnings(caplog: pytest.LogCaptureFixture) -> None:
    measured = train(Regressor(), Health("5ba"))
    assert all(measured[name] == [0.0] * 4 for name in HEALTH_STATES)
    assert warnings_of(caplog) == []
    assert measured["target_variance"] == pytest.approx([1.0] * 4, abs=0.2)
    assert measured["prediction_variance"] == pytest.approx(measured["target_variance"])


@pytest.mark.parametrize(
    ("state", "model", "reason"),
    [
        (
            "collapse",
            Regressor(scale=0.09),
            r"collapse at batch 5: the prediction's variance over the microbatch is 0.00",
        ),
        (
            "dead",
            Regressor(shift=1.2),
            r"dead at batch 5: the mean squared error 1.\d+ is no better than a constant prediction's, [01].\d+",
        ),
        ("diverging", Regressor(errors=dict.fromkeys(range(10, 20), 0.2)), "diverging at batch 15: the mean loss 0.04"),
        ("non_finite", Regressor(errors={9: math.inf}), "non_finite at batch 10: infinite or NaN: loss, "),
        ("non_finite", Regressor(errors={7: math.nan}), "non_finite at batch 10: infinite or NaN: loss"),
    ],
)
def test_warns_once_of_each_state(state: str, model: Regressor, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    measured = train(model, Health("5ba"))
    assert {name for name in HEALTH_STATES if any(measured[name])} == {state}
    [warning] = warnings_of(caplog)  # once, however long the state lasts
    assert re.search(reason, warning)


def test_a_slow_start_is_not_dead(caplog: pytest.LogCaptureFixture) -> None:
    errors = dict.fromkeys(range(9), 1.2)
    measured = train(Regressor(errors=errors), Health("1ba", grace="0.5dur"))
    assert not any(measured["dead"])
    measured = train(Regressor(errors=errors), Health("1ba", grace="4ba"))
    assert measured["dead"] == [0.0] * 3 + [1.0] * 6 + [0.0] * 11


class Overflow(Callback):
    """Halves the loss scale in batch 7, as a scaler does after an infinite gradient."""

    def batch_start(self, state: State, logger: Logger) -> None:
        state.scaler = cast(Any, GradScaler("cpu", init_scale=1024.0 if state.timestamp.batch < 7 else 512.0))


def test_warns_of_skipped_steps(caplog: pytest.LogCaptureFixture) -> None:
    measured = train(Regressor(), Overflow(), Health("5ba"))
    assert measured["scaler_skips"] == [0.0, 1.0, 0.0, 0.0]
    assert warnings_of(caplog) == ["health: scaler_skips at batch 10: the loss scale fell from 1024 to 512"]


def test_logs_every_number_of_a_distillation(small_data: Path, tmp_path: Path) -> None:
    """In bfloat16 and with microbatches."""
    options = ("callbacks.health={interval: 2ba}", "precision=amp_bf16", "device_train_microbatch_size=6")
    train_recipe.main(small_run(tmp_path, small_data, *options, "max_duration=4ba"))
    log = read_jsonl(tmp_path / "log.jsonl")
    measured = {key.removeprefix("health/"): values for key, values in log.items() if key.startswith("health/")}
    assert measured.keys() == {*HEALTH_STATES, "prediction_error", "prediction_variance", "target_variance"}
    for name, values in measured.items():
        assert list(values) == [2, 4], name
    assert measured["collapse"] == measured["non_finite"] == {2: 0.0, 4: 0.0}


def test_one_input_has_no_variance_and_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    assert train(Regressor(), Health("5ba"), batch_size=1).keys() == {*HEALTH_STATES, "prediction_error"}
    assert warnings_of(caplog) == []


def test_padding_does_not_count() -> None:
    """Numbers of a padded batch are those of its valid tokens, whatever is behind them."""
    prediction, target = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    mask = torch.arange(5) >= torch.tensor([5, 5, 3])[:, None]
    numbers = Health().compare(Regression(prediction, target, None, mask))
    for tensor in (prediction, target):
        tensor[mask] = 1e3
    for name, value in Health().compare(Regression(prediction, target, None, mask)).items():
        torch.testing.assert_close(numbers[name], value)
    torch.testing.assert_close(numbers["target_variance"], target[:, :3].var(dim=0).mean())
    whole, none = (Regression(prediction, target, None, padding) for padding in (torch.zeros_like(mask), None))
    for name, value in Health().compare(whole).items():
        torch.testing.assert_close(Health().compare(none)[name], value)
