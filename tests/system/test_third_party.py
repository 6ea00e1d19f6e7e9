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


class Events(Callback):
    """Records each event, by the method of all."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def run_event(self, event: Event, state: Any, logger: Logger) -> None:
        self.seen.append((event.value, int(state.timestamp.batch)))


class Ends(Callback):
    """Records two events, by their own methods."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def batch_end(self, state: Any, logger: Logger) -> None:
        self.seen.append(int(state.timestamp.batch))

    def fit_end(self, state: Any, logger: Logger) -> None:
        self.seen.append(-1)


def fit_twice(engine: Callable[[Trainer], Any]) -> tuple[Events, Ends, dict[str, list[int]]]:
    """Train three batches, and then, as a resumed run does, 19 more; return also the batches of each log key."""
    model, events, ends, memory = Linear(), Events(), Ends(), InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=[torch.ones(2, 8)] * 50,
        device_train_microbatch_size=2,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=[events, ends, LRMonitor(), RuntimeEstimator(skip_batches=0)],
        loggers=memory,
        progress_bar=False,
        max_duration="22ba",
    )
    for duration in ("3ba", "19ba"):
        with engine(trainer):
            trainer.fit(duration=duration)
    trainer.close()
    return events, ends, {key: [int(time.batch) for time, _ in logged] for key, logged in memory.data.items()}


def test_all_events_arrive_and_monitors_log_every_ten_batches() -> None:
    events, ends, logged = fit_twice(lean_engine)
    all_events, all_ends, all_logged = fit_twice(lambda _: nullcontext())
    assert events.seen == all_events.seen
    assert ends.seen == all_ends.seen == [*range(1, 4), -1, *range(4, 23), -1]
    assert logged["lr-SGD/group0"] == logged["time/remaining_estimate"] == [10, 20]
    assert len(all_logged["lr-SGD/group0"]) == 22
