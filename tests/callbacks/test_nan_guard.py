"""Numbers that are not finite stop a run, and are never saved; tests/recipes/test_float16.py skips some."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from composer import Callback, Event, Logger, State, Trainer
from composer.algorithms import GradientClipping
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from d2v_composer.callbacks import GradientNorm
from d2v_composer.callbacks.checkpointing import Checkpoints, NanGuard
from d2v_composer.checkpoints.load import load_teacher
from d2v_composer.models.names import Normalization
from d2v_composer.models.targets import norm_mean
from d2v_composer.objectives.distillation import DistillationModel
from d2v_composer.system.addresses import RunFolder
from helpers import GOLDEN, load_checkpoint, small_run
from recipes import train as train_recipe

NUM_BATCHES, BATCH_SIZE = 12, 8


def train(folder: Path, *callbacks: Callback) -> None:
    """Train twelve batches with a checkpoint after each."""
    torch.manual_seed(0)
    teacher = load_teacher(GOLDEN / "tiny_base.pt")
    model = DistillationModel(teacher, teacher.build_student(depth=2))
    images = torch.randint(0, 256, (NUM_BATCHES * BATCH_SIZE, 3, 32, 32), dtype=torch.uint8)
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(list(images), batch_size=BATCH_SIZE),  # pyright: ignore[reportArgumentType]
        max_duration=f"{NUM_BATCHES}ba",
        optimizers=torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3),
        algorithms=[GradientClipping("norm", 2.0), GradientNorm(every=1)],
        callbacks=[NanGuard(), *callbacks, Checkpoints(RunFolder(folder), "1ba")],
        progress_bar=False,
    )
    try:
        trainer.fit()
    finally:
        trainer.engine.close()


def assert_all_saved_is_finite(folder: Path) -> None:
    """Check the weights and moments of all checkpoints of a run."""
    for path in folder.glob("ep*.pt"):
        state = load_checkpoint(path)["state"]
        saved = tree_leaves([state["model"], state["optimizers"]])
        assert all(tensor.isfinite().all() for tensor in saved if isinstance(tensor, Tensor))


@pytest.mark.parametrize("normalization", ["instance", "layer"])
def test_a_target_without_variance_is_zero(normalization: Normalization) -> None:
    """As of black images, or of a teacher with constant outputs; not NaN."""
    assert not norm_mean([torch.full((2, 5, 8), 0.1)] * 2, normalization=normalization).any()


def change_gradient(state: State, change: Callable[[Tensor], object]) -> None:
    change(next(parameter.grad for parameter in state.model.parameters() if parameter.grad is not None))


def infinite_gradient(state: State) -> None:
    """Clipping turns it into NaN in every weight, while the batch's loss is normal."""
    change_gradient(state, lambda gradient: gradient.view(-1)[3].fill_(torch.inf))


def large_gradient(state: State) -> None:
    """Its square is beyond float32. AdamW divides by it, so that the weight would never change again."""
    change_gradient(state, lambda gradient: gradient.fill_(1e30))


def infinite_loss(state: State) -> None:
    assert isinstance(state.loss, Tensor)
    state.loss = state.loss * torch.inf


class Fault(Callback):
    """Changes the state in batch 5."""

    def __init__(self, at: Event, change: Callable[[State], None]) -> None:
        self.at, self.change = at, change

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event is Event.FIT_START:  # on a GPU Composer has an enabled scaler in fp32, but does not use it
            state.scaler = cast(Any, GradScaler("cpu"))
        if event is self.at and state.timestamp.batch == 5:
            self.change(state)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            Fault(Event.AFTER_BACKWARD, infinite_gradient),
            r"model\.student\.blocks\S+ has values that are not finite; earlier",
        ),
        (
            Fault(Event.AFTER_TRAIN_BATCH, large_gradient),
            r"optimizers\.AdamW\.state\.\S+\.exp_avg_sq has values that are not finite",
        ),
        (Fault(Event.AFTER_LOSS, infinite_loss), "the training loss is inf; earlier checkpoints"),
    ],
)
def test_stops_after_numbers_that_are_not_finite(fault: Fault, message: str, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=f"^batch 6: {message}"):
        train(tmp_path, fault)
    assert_all_saved_is_finite(tmp_path)
    assert (tmp_path / "latest-rank0.pt").readlink().name == "ep0-ba5-rank0.pt"


@pytest.fixture
def allowed_tf32() -> Iterator[list[Any]]:
    """torch's two switches, on."""
    switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = True
    yield switches
    for switch, allowed in zip(switches, before, strict=True):
        switch.allow_tf32 = allowed


def test_tf32_is_the_users_choice(allowed_tf32: list[Any], small_data: Path, tmp_path: Path) -> None:
    """Although each of Composer's GPU devices changes it."""
    options = ("max_duration=1ba", "scheduler.t_warmup=1ba", "allow_tf32=false")
    train_recipe.main(small_run(tmp_path, small_data, *options))
    assert not any(switch.allow_tf32 for switch in allowed_tf32)
