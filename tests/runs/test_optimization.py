"""Parameter groups, and the schedule that the Trainer follows."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.core import Time, Timestamp

from d2v_composer.config.schema import OptimizerConfig, SchedulerConfig, TrainerConfig
from d2v_composer.runs.trainer import build_optimizer, build_scheduler
from d2v_composer.system.errors import InputError

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


def learning_rates(max_duration: str, t_warmup: str, num_batches: int) -> list[float]:
    """The factors of the learning rate at the first batches; a warning would fail the test."""
    config = TrainerConfig(max_duration=max_duration, scheduler=SchedulerConfig(t_warmup=t_warmup))
    scheduler = build_scheduler(config, BATCHES_PER_EPOCH)
    duration = Time.from_timestring(max_duration)
    states: list[Any] = [
        SimpleNamespace(
            max_duration=duration,
            dataloader_len=Time.from_batch(BATCHES_PER_EPOCH),
            timestamp=Timestamp(epoch=batch // BATCHES_PER_EPOCH, batch=batch),
        )
        for batch in range(num_batches)
    ]
    return [scheduler(state) for state in states]


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
