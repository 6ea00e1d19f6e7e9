"""Numbers at the edge: the run goes on, or ends with a word, and nothing that is not finite is ever saved."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from composer import Callback, Logger, State, Trainer
from composer.algorithms import GradientClipping
from composer.utils import create_interval_scheduler
from conftest import GOLDEN, load_checkpoint
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.utils.data import DataLoader

from d2v_composer.algorithms import GradientNorm
from d2v_composer.callbacks import FiniteTraining
from d2v_composer.models.distillation import DistillationModel
from d2v_composer.models.load import load_teacher

NUM_BATCHES, BATCH_SIZE = 12, 8


def build_model(change: Callable[[nn.Module], None] = lambda teacher: None) -> DistillationModel:
    torch.manual_seed(0)
    teacher = load_teacher(GOLDEN / "tiny_base.pt")
    change(teacher)
    return DistillationModel(teacher, teacher.build_student(depth=2))


def some_images() -> Tensor:
    return torch.randint(
        0, 256, (NUM_BATCHES * BATCH_SIZE, 3, 32, 32), generator=torch.Generator().manual_seed(0)
    ).byte()


def train(
    folder: Path, model: DistillationModel, images: Tensor, *callbacks: Callback, lr: float = 1e-3
) -> list[float]:
    """Twelve batches, each of which is saved; the losses."""
    losses = Losses()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(list(images), batch_size=BATCH_SIZE),  # pyright: ignore[reportArgumentType]
        max_duration=f"{NUM_BATCHES}ba",
        optimizers=torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=lr),
        algorithms=[GradientClipping("norm", 2.0), GradientNorm(every=1)],
        callbacks=[losses, FiniteTraining(create_interval_scheduler("1ba")), *callbacks],
        save_folder=str(folder),
        save_interval="1ba",
        progress_bar=False,
    )
    try:
        trainer.fit()
    finally:
        trainer.engine.close()
    return losses.values


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        self.values.append(state.total_loss_dict["loss/train/total"])


def saved_tensors(folder: Path) -> Iterator[Tensor]:
    """Weights and moments of every checkpoint of a run."""
    for path in sorted(folder.glob("ep*.pt")):
        state = load_checkpoint(path)["state"]
        yield from state["model"].values()
        for optimizer in state["optimizers"].values():
            for moments in optimizer["state"].values():
                yield from (value for value in moments.values() if isinstance(value, Tensor))


def assert_all_saved_is_finite(folder: Path) -> None:
    assert all(tensor.isfinite().all() for tensor in saved_tensors(folder))


IMAGES = {
    "identical": lambda: some_images()[:1].expand(NUM_BATCHES * BATCH_SIZE, -1, -1, -1),
    "black": lambda: torch.zeros_like(some_images()),
    "white": lambda: torch.full_like(some_images(), 255),
    "some black": lambda: some_images() * (torch.arange(NUM_BATCHES * BATCH_SIZE) % 2)[:, None, None, None].byte(),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_without_a_difference(name: str, tmp_path: Path) -> None:
    losses = train(tmp_path, build_model(), IMAGES[name]())
    assert len(losses) == NUM_BATCHES
    assert losses[-1] < losses[0] < 3
    assert_all_saved_is_finite(tmp_path)
    assert len(list(tmp_path.glob("ep*.pt"))) == NUM_BATCHES


def zeros(teacher: nn.Module) -> None:
    for parameter in teacher.parameters():
        nn.init.zeros_(parameter)


def constants(teacher: nn.Module) -> None:
    for parameter in teacher.parameters():
        nn.init.constant_(parameter, 0.01)


@pytest.mark.parametrize("change", [zeros, constants])
def test_a_teacher_that_says_the_same_of_everything(change: Callable[[nn.Module], None], tmp_path: Path) -> None:
    """InstanceNorm and LayerNorm of a constant are 0, not NaN."""
    losses = train(tmp_path, build_model(change), some_images())
    assert losses[-1] <= losses[0]
    assert_all_saved_is_finite(tmp_path)


def first_gradient(state: State) -> Tensor:
    return next(each.grad for each in state.model.parameters() if each.grad is not None)


class BadGradient(Callback):
    """Makes one number of a gradient infinite, or NaN, before batch 5 is stepped."""

    def __init__(self, value: float) -> None:
        self.value = value

    def after_backward(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == 5:
            first_gradient(state).view(-1)[3] = self.value


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite(value: float, tmp_path: Path) -> None:
    """Clipping makes NaN of it in every weight, while the loss of the batch is as good as any."""
    with pytest.raises(
        FloatingPointError, match=r"^batch 5: the weight student\.blocks\S+ is not finite; what was saved"
    ):
        train(tmp_path, build_model(), some_images(), BadGradient(value))
    assert_all_saved_is_finite(tmp_path)
    assert (tmp_path / "latest-rank0.pt").readlink().name == "ep0-ba5-rank0.pt"


def test_a_step_that_is_too_large(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"^batch \d+: "):
        train(tmp_path, build_model(), some_images(), lr=1e36)
    assert_all_saved_is_finite(tmp_path)


def test_moments_that_are_not_finite(tmp_path: Path) -> None:
    """AdamW divides by them: the weight would stay where it is for ever."""

    class LargeGradient(Callback):
        def after_train_batch(self, state: State, logger: Logger) -> None:
            if state.timestamp.batch == 5:
                first_gradient(state).fill_(1e30)  # after clipping; its square is beyond float32

    with pytest.raises(FloatingPointError, match=r"^batch 5: the optimizer's exp_avg_sq of student\.\S+ is not finite"):
        train(tmp_path, build_model(), some_images(), LargeGradient())
    assert_all_saved_is_finite(tmp_path)


class Scaler(Callback):
    """Gives the run a loss scaler that is down at a certain scale, as Composer does on a GPU with amp_fp16."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def batch_start(self, state: State, logger: Logger) -> None:
        scaler = GradScaler("cpu", init_scale=self.scale if state.timestamp.batch >= 3 else 1024.0)
        scaler.scale(torch.zeros(1))  # it is made with the first loss
        state.scaler = cast(Any, scaler)


def test_a_loss_scaler_at_its_floor(tmp_path: Path) -> None:
    """fairseq ends at 1e-4 as well: nothing is learned any more, and nothing says so."""
    assert len(train(tmp_path / "above", build_model(), some_images(), Scaler(1.1e-4))) == NUM_BATCHES
    with pytest.raises(FloatingPointError, match=r"^batch 3: the loss scaler is down at 5e-05, for the gradients"):
        train(tmp_path / "below", build_model(), some_images(), Scaler(5e-5))
    assert (tmp_path / "below" / "latest-rank0.pt").readlink().name == "ep0-ba3-rank0.pt"


def test_fp16_overflows_in_the_first_steps() -> None:
    """The scaler comes down from where float16 ends, and what is trained then is finite and gets better."""
    model, images = build_model(), some_images()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    scaler = GradScaler("cpu", init_scale=2.0**40)
    losses = []
    for step in range(80):
        with torch.autocast("cpu", torch.float16):
            outputs = model(images[: 2 * BATCH_SIZE])
            loss = model.loss(outputs, images)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        assert all(each.isfinite().all() for each in model.student.parameters()), step
    assert scaler.get_scale() < 2.0**40
    assert losses[0] == losses[1]  # the first step was left out
    assert losses[-1] < 0.8 * losses[0]
