"""FSDP gathers each part of the model only while it computes.

In one process: what is gathered, and when, does not depend on the number of ranks. Two ranks train in
tests/recipes/test_train_on_several_ranks.py.
"""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from composer import Callback, Event, State, Trainer
from composer.loggers import Logger
from composer.utils import FSDP2Config, ParallelismConfig
from torch import Tensor
from torch.utils.data import DataLoader

from d2v_composer.checkpoints.load import load_teacher
from d2v_composer.models.distillation import DistillationModel
from d2v_composer.models.execution import join_units, sharded_units
from helpers import GOLDEN
from programs.sharded_state import gathered_bytes, gathered_units

NUM_BATCHES, BATCH_SIZE = 3, 8
FROZEN = {"teacher.encoder", *(f"teacher.encoder.context_encoder.blocks.{i}" for i in range(2))} | {
    f"teacher.blocks.{i}" for i in range(3)
}
TRAINED = {f"student.blocks.{i}" for i in range(3)}


class Watch(Callback):
    """Records the gathered units at each event, and the losses."""

    def __init__(self) -> None:
        self.gathered: dict[Event, list[set[str]]] = {}
        self.losses: list[float] = []

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event in (Event.BEFORE_FORWARD, Event.AFTER_FORWARD, Event.AFTER_BACKWARD, Event.BATCH_END):
            self.gathered.setdefault(event, []).append(gathered_units(state.model))
        if event is Event.BATCH_END:
            self.losses.append(state.total_loss_dict["loss/train/total"])


def some_images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (NUM_BATCHES * BATCH_SIZE, 3, 32, 32), generator=generator).byte()


def build(*callbacks: Callback, sharded: bool = True) -> tuple[DistillationModel, Trainer]:
    torch.manual_seed(0)
    teacher = load_teacher(GOLDEN / "tiny_base.pt")
    model = DistillationModel(teacher, teacher.build_student(depth=3))
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(list(some_images()), batch_size=BATCH_SIZE),  # pyright: ignore[reportArgumentType]
        max_duration=f"{NUM_BATCHES}ba",
        optimizers=torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3),
        device_train_microbatch_size=4,
        parallelism_config=ParallelismConfig(fsdp2=FSDP2Config(state_dict_type="full")) if sharded else None,
        callbacks=list(callbacks),
        progress_bar=False,
    )
    if sharded:
        join_units(model, cast("Any", trainer.state.fsdp_config).device_mesh)
    return model, trainer


# Composer's notes that FSDP2 may change and that an attribute will be renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:FSDP2 Config/APIs are experimental:UserWarning"),
    pytest.mark.filterwarnings("ignore:The _fsdp_wrap attribute:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def plain_losses() -> list[float]:
    """The losses without FSDP."""
    watch = Watch()
    build(watch, sharded=False)[1].fit()
    return watch.losses


def test_nothing_stays_gathered(plain_losses: list[float]) -> None:
    watch = Watch()
    model, trainer = build(watch)
    assert set(sharded_units(model)) == FROZEN | TRAINED
    trainer.fit()
    assert watch.losses == pytest.approx(plain_losses, rel=1e-6)
    assert len(watch.losses) == NUM_BATCHES
    for event, gathered in watch.gathered.items():
        assert gathered == [set()] * len(gathered), event
    assert {event: len(gathered) for event, gathered in watch.gathered.items()} == {
        Event.BEFORE_FORWARD: 2 * NUM_BATCHES,
        Event.AFTER_FORWARD: 2 * NUM_BATCHES,
        Event.AFTER_BACKWARD: 2 * NUM_BATCHES,
        Event.BATCH_END: NUM_BATCHES,
    }
    assert gathered_bytes(model) == 0


PARTS: dict[str, Callable[[DistillationModel, Tensor], Any]] = {
    "student": lambda model, images: model.embed_all(images),
    "teacher": lambda model, images: model.retrieval_baselines()["teacher"](images),
    "student by itself": lambda model, images: model.student.embed(images),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_runs_before_the_first_batch_does_not_stay_gathered(part: str, plain_losses: list[float]) -> None:
    """As in a retrieval at the start. Training is unchanged."""
    watch = Watch()
    model, trainer = build(watch)
    with torch.no_grad():
        PARTS[part](model.eval(), some_images()[:4])
    assert gathered_units(model) == set()
    assert gathered_bytes(model) == 0
    trainer.fit()
    assert watch.losses == pytest.approx(plain_losses, rel=1e-6)
