"""The patched engine of Composer calls what a run needs, and no more."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from composer import Callback, Event, Trainer
from composer.callbacks import LRMonitor, RuntimeEstimator
from composer.loggers import InMemoryLogger, Logger

from d2v_composer.system.third_party import lean_engine
from foreign_models import Linear


class Everything(Callback):
    """Records each event."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def run_event(self, event: Event, state: Any, logger: Logger) -> None:
        self.events.append((event.value, int(state.timestamp.batch)))


class BatchEnds(Callback):
    """Records two events by their methods."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def batch_end(self, state: Any, logger: Logger) -> None:
        self.batches.append(int(state.timestamp.batch))

    def fit_end(self, state: Any, logger: Logger) -> None:
        self.batches.append(-1)


def fit_twice(engine: Callable[[Trainer], Any]) -> tuple[Everything, BatchEnds, InMemoryLogger]:
    """Train three batches, and then, as a resumed run does, 19 more."""
    model, everything, batch_ends, memory = Linear(), Everything(), BatchEnds(), InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=[torch.ones(2, 8)] * 50,
        device_train_microbatch_size=2,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=[everything, batch_ends, LRMonitor(), RuntimeEstimator(skip_batches=0)],
        loggers=memory,
        progress_bar=False,
        max_duration="22ba",
    )
    for duration in ("3ba", "19ba"):
        with engine(trainer):
            trainer.fit(duration=duration)
    trainer.close()
    return everything, batch_ends, memory


def test_all_events_arrive_and_monitors_log_every_ten_batches() -> None:
    everything, batch_ends, memory = fit_twice(lean_engine)
    expected = fit_twice(lambda _: nullcontext())
    assert everything.events == expected[0].events
    assert batch_ends.batches == expected[1].batches == [*range(1, 4), -1, *range(4, 23), -1]
    learning_rates = [int(time.batch) for time, _ in memory.data["lr-SGD/group0"]]
    assert learning_rates == [10, 20]
    assert [int(time.batch) for time, _ in memory.data["time/remaining_estimate"]] == [10, 20]
    assert len(expected[2].data["lr-SGD/group0"]) == 22
