"""amp_fp16, the default precision: a loss scaler and no closure, rehearsed on a CPU."""

import importlib
import math
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer import Callback, Logger, State
from composer.core import precision
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from d2v_composer.models import precision as our_precision
from helpers import losses_of, small_run
from recipes import train

FLOAT16 = ("precision=amp_fp16", "callbacks.health={interval: 1ba}", "device_train_microbatch_size=6")


class Watch(Callback):
    """Record what each batch leaves: the scaler's state, Adam's steps and the student."""

    def __init__(self) -> None:
        self.scales: list[dict[str, Any]] = []
        self.steps: list[float] = []
        self.students: list[Tensor] = []

    def fit_start(self, state: State, logger: Logger) -> None:
        self.record(state)

    def batch_end(self, state: State, logger: Logger) -> None:
        self.record(state)

    def record(self, state: State) -> None:
        assert state.scaler is not None
        optimizer = state.optimizers[0]
        trained = optimizer.param_groups[0]["params"]
        self.scales.append(state.scaler.state_dict())
        self.steps.append(max([float(moments["step"]) for moments in optimizer.state.values()], default=0))
        self.students.append(torch.cat([parameter.detach().flatten() for parameter in trained]))


class NotFinite(Callback):
    """Make the loss of every batch from the third infinite."""

    def after_loss(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch >= 2:
            assert isinstance(state.loss, Tensor)
            state.loss = state.loss * math.inf


def allow_float16(monkeypatch: pytest.MonkeyPatch, **scaler: float) -> None:
    """Let Composer train in amp_fp16 on a CPU, with the arguments of a GradScaler.

    Composer refuses float16 there. Here it casts by autocast, scales the loss by torch's GradScaler, and steps without
    a closure, the path of the default precision on GPUs.
    """
    trainer = importlib.import_module("composer.trainer.trainer")
    autocast = SimpleNamespace(
        cuda=torch.cuda, float16=torch.float16, autocast=lambda _, dtype: torch.autocast("cpu", dtype)
    )
    monkeypatch.setattr(our_precision, "has_gpu", lambda: True)
    monkeypatch.setattr(precision, "DeviceCPU", ())  # no device is one that refuses
    monkeypatch.setattr(precision, "is_xla_installed", lambda: True)
    monkeypatch.setattr(precision, "torch", autocast)
    monkeypatch.setattr(trainer, "GradScaler", partial(GradScaler, "cpu", **scaler))


def run(folder: Path, data: Path, *overrides: str) -> Watch:
    watch = Watch()
    trainer = train.main(small_run(folder, data, *FLOAT16, *overrides), [watch])
    model: Any = trainer.state.model
    assert {parameter.dtype for parameter in model.teacher.block_list[0].mlp.parameters()} == {torch.float16}
    return watch


@pytest.mark.slow
def test_the_losses_are_nearly_those_of_float32(
    uninterrupted: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_float16(monkeypatch)
    watch = run(tmp_path, small_data)
    assert watch.steps == list(range(15))
    assert {state["scale"] for state in watch.scales} == {2.0**16}
    assert losses_of(tmp_path) == pytest.approx(losses_of(uninterrupted), rel=2e-3)


@pytest.mark.usefixtures("one_thread")
def test_an_overflow_skips_the_step_and_a_resume_has_the_scale(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients overflow at the first steps, and again when the scale has grown."""
    allow_float16(monkeypatch, init_scale=2.0**20, growth_interval=3, growth_factor=64.0)
    watch = run(tmp_path / "whole", small_data, "save_num_checkpoints_to_keep=-1")
    scales = [state["scale"] for state in watch.scales]
    skipped = [after < before for before, after in pairwise(scales)]
    assert skipped[0]
    assert sum(skipped) >= 2
    assert any(after > before for before, after in pairwise(scales))
    for i, is_skipped in enumerate(skipped):
        assert torch.equal(watch.students[i], watch.students[i + 1]) == is_skipped
        assert watch.steps[i + 1] == watch.steps[i] + (not is_skipped)
    assert all(map(math.isfinite, losses_of(tmp_path / "whole").values()))

    resumed = run(tmp_path / "resumed", small_data, f"load_path={tmp_path / 'whole' / 'ep1-ba8-rank0.pt'}")
    assert resumed.scales == watch.scales[8:]
    assert resumed.steps == watch.steps[8:]
    assert all(map(torch.equal, resumed.students, watch.students[8:]))


@pytest.mark.usefixtures("one_thread")
def test_a_scale_at_its_floor_ends_the_run(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow_float16(monkeypatch, init_scale=2.0**-10)
    with pytest.raises(
        FloatingPointError, match=r"^batch 6: the loss scale fell to 6\.1\S+e-05 because the gradients are not"
    ):
        train.main(small_run(tmp_path, small_data, *FLOAT16), [NotFinite()])
