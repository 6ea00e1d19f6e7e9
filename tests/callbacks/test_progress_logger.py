"""Progress of a run: bar and lines, and the callbacks that measure their numbers."""

import io
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from composer.algorithms import GradientClipping
from composer.core import Callback, State
from composer.loggers import InMemoryLogger, Logger, LoggerDestination
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from d2v_composer.callbacks import GradientNorm, ProgressLogger, Throughput
from foreign_models import Linear, fit


class Clock:
    """A clock that stands still unless it is moved."""

    seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds

    monotonic = perf_counter


class Numbers(Dataset[Tensor]):
    """Twelve rows of eight, each of which takes 20 ms."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        self.clock.seconds += 0.02
        return torch.arange(8.0) + index


class Work(Callback):
    """Takes 10 ms for a step and, as an evaluation does, 200 ms at its end."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def after_forward(self, state: State, logger: Logger) -> None:
        self.clock.seconds += 0.01

    def batch_end(self, state: State, logger: Logger) -> None:
        self.clock.seconds += 0.2


def train(
    loader: DataLoader | None = None, loggers: Sequence[LoggerDestination] = (), **options: Any
) -> dict[str, list[tuple[Any, Any]]]:
    """Train six batches of two, and return everything that was logged."""
    memory = InMemoryLogger()
    loader = loader or DataLoader(Numbers(), batch_size=2)
    fit(Linear(), loader, "6ba", lr=0.1, loggers=[memory, *loggers], **options)
    return memory.data


def test_gradient_norm_is_logged_before_clipping() -> None:
    """The loss is w · mean(x), so its gradient is the batch's mean row."""
    logged = train(algorithms=[GradientClipping(clipping_type="norm", clipping_threshold=0.5), GradientNorm(every=2)])
    norms = [value for _, value in logged["l2_norm/grad/global"]]
    expected = [(torch.arange(8.0) + first + 0.5).norm().item() for first in (0, 4, 8)]
    assert norms == pytest.approx(expected)


def test_throughput_excludes_callbacks_and_counts_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of two images waits for 40 ms and takes 10 ms; the work at its end does not count."""
    clock = Clock()
    monkeypatch.setattr("d2v_composer.callbacks.logging.time", clock)
    loader = DataLoader(Numbers(clock), batch_size=2)
    logged = train(loader, callbacks=[Throughput(every=3), Work(clock)])
    assert [value for _, value in logged["throughput/samples_per_sec"]] == pytest.approx([40, 40])
    assert [value for _, value in logged["throughput/data_wait"]] == pytest.approx([0.8, 0.8])


def test_a_slow_run_prints_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a retrieval; tests/promises/test_run.py has a run with one."""
    clock, stream = Clock(), io.StringIO()
    monkeypatch.setattr("tqdm.std.time", clock.monotonic)

    class Slow(Callback):
        def after_forward(self, state: State, logger: Logger) -> None:
            clock.seconds += 4

    train(loggers=[ProgressLogger(bar=False, stream=stream)], callbacks=[Throughput(every=1), Slow()])
    first, last = stream.getvalue().splitlines()
    assert first.startswith("batch 3/6 (50 %)  ")
    assert first.endswith("left 00:12")
    line = r"batch 6/6 \(100 %\)  loss -?\d+\.\d{4}  \d+ images/s  data wait \d+%  left 00:00"
    assert re.fullmatch(line, last)
