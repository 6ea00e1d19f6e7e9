"""Progress of a run: bar and lines, and the callbacks that measure their numbers."""

import io
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from composer.algorithms import GradientClipping
from composer.core import Callback, Event, State
from composer.loggers import InMemoryLogger, Logger, LoggerDestination
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from d2v_composer.builders.trainer import build_algorithms
from d2v_composer.callbacks import GradientNorm, ProgressLogger, Throughput
from d2v_composer.config.schema import AlgorithmsConfig
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


def test_clipping_is_by_the_norm_of_all_that_is_trained() -> None:
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    for weight in weights:
        weight.grad = torch.full((2,), 0.5)
    state: Any = SimpleNamespace(optimizers=[torch.optim.SGD(weights[:2]), torch.optim.SGD(weights[2:])])
    build_algorithms(AlgorithmsConfig())[0].apply(Event.AFTER_TRAIN_BATCH, state, Mock())
    assert [weight.grad.tolist() for weight in weights if weight.grad is not None] == [[0.5, 0.5]] * 3  # below 2
    for weight in weights:
        weight.grad = torch.full((2,), 10.0)
    build_algorithms(AlgorithmsConfig())[0].apply(Event.AFTER_TRAIN_BATCH, state, Mock())
    clipped = [value for weight in weights if weight.grad is not None for value in weight.grad.tolist()]
    assert clipped == pytest.approx([2 / 6**0.5] * 6)


def test_throughput_excludes_callbacks_and_counts_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of two images waits for 40 ms and takes 10 ms; the work at its end does not count."""
    clock = Clock()
    monkeypatch.setattr("d2v_composer.callbacks.logging.time", clock)
    loader = DataLoader(Numbers(clock), batch_size=2)
    logged = train(loader, callbacks=[Throughput(every=3), Work(clock)])
    assert [value for _, value in logged["throughput/samples_per_sec"]] == pytest.approx([40, 40])
    assert [value for _, value in logged["throughput/data_wait"]] == pytest.approx([0.8, 0.8])


def test_plain_lines_show_the_logged_numbers() -> None:
    """Without a retrieval; tests/promises/test_run.py has a run with one."""
    stream = io.StringIO()
    train(loggers=[ProgressLogger(bar=False, stream=stream)], callbacks=[Throughput(every=1)])
    line = r"batch 6/6 \(100 %\)  loss -?\d+\.\d{4}  \d+ images/s  data wait \d+%  left 00:00\n"
    assert re.fullmatch(line, stream.getvalue())


def test_a_slow_run_prints_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stream = Clock(), io.StringIO()
    monkeypatch.setattr("tqdm.std.time", clock.monotonic)

    class Slow(Callback):
        def after_forward(self, state: State, logger: Logger) -> None:
            clock.seconds += 4

    train(loggers=[ProgressLogger(bar=False, stream=stream)], callbacks=[Slow()])
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["batch 3/6 (50 %)", "batch 6/6 (100 %)"]
    assert lines[0].endswith("left 00:12")
