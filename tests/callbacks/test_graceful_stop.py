"""A signal cuts a measurement short, and nothing else of a retrieval; the last batch is finished."""

import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.core import Precision

from d2v_composer.callbacks import GracefulStop, ZeroShotRetrieval
from d2v_composer.system import processes

LAST_BATCH = 5


class Timestamp(int):
    """The number of a batch, as Composer gives it."""

    @property
    def batch(self) -> int:
        return int(self)


class Run:
    """A run of one rank with one retrieval, which does something while it measures and while it logs the accuracy."""

    def __init__(self) -> None:
        self.stop, self.retrieval = GracefulStop("1000ba"), ZeroShotRetrieval({}, embed=lambda images: images)
        self.while_measuring: Callable[[], object] = int
        self.while_logging: Callable[[], object] = int
        self.logged: list[dict[str, float]] = []
        self.retrieval.datasets = {"small": None}  # type: ignore[dict-item]
        self.retrieval.measure_set = self.measure_set
        self.state: Any = SimpleNamespace(
            callbacks=[self.stop, self.retrieval],
            model=torch.nn.Identity(),
            fsdp_enabled=False,
            precision=Precision.FP32,
            precision_config=None,
            max_duration=LAST_BATCH,
        )
        self.stop.init(self.state, self.logger)

    @property
    def logger(self) -> Any:
        return SimpleNamespace(log_metrics=self.log_metrics)

    def measure_set(self, dataset: str, embeds: Any, state: Any) -> dict[str | None, dict[str, float]]:
        self.retrieval.stop_if_asked()
        self.while_measuring()
        self.retrieval.stoppable(embeds[None])(torch.zeros(1))
        return {None: {"accuracy": 0.5}}

    def log_metrics(self, metrics: dict[str, float]) -> None:
        self.while_logging()
        self.logged.append(metrics)

    def end_batch(self, batch: int) -> None:
        self.state.timestamp = Timestamp(batch)
        self.stop.batch_end(self.state, self.logger)
        self.retrieval.evaluate(self.state, self.logger)


@pytest.fixture
def run() -> Iterator[Run]:
    yield Run()
    processes.forget_signals()


def test_a_measurement_is_cut_short(run: Run) -> None:
    run.while_measuring = lambda: signal.raise_signal(signal.SIGINT)
    run.end_batch(3)
    assert run.retrieval.was_stopped
    assert run.stop.stopped_by == signal.SIGINT
    assert run.retrieval.history == run.logged == []


def test_what_was_measured_is_recorded(run: Run) -> None:
    run.while_logging = lambda: signal.raise_signal(signal.SIGTERM)
    run.end_batch(3)
    assert not run.retrieval.was_stopped
    assert [entry["batch"] for entry in run.retrieval.history] == [3]
    assert [list(metrics) for metrics in run.logged] == [["time/zero_shot_retrieval"], ["accuracy"]]
    run.end_batch(4)
    assert run.stop.stopped_by == signal.SIGTERM
    assert run.retrieval.was_stopped


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_in_the_last_batch_the_retrieval_is_finished_and_the_run_exits(run: Run, signum: signal.Signals) -> None:
    run.while_measuring = lambda: signal.raise_signal(signum)
    run.end_batch(LAST_BATCH)
    assert [entry["batch"] for entry in run.retrieval.history] == [LAST_BATCH]
    assert not run.retrieval.was_stopped
    with pytest.raises(SystemExit) as ended:
        run.stop.end_training(run.state, run.logger)
    assert ended.value.code == 128 + signum


def test_before_the_first_batch_and_after_the_last_the_programs_own_handlers_are_in_place(run: Run) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run.end_batch(LAST_BATCH)
    assert signal.getsignal(signal.SIGTERM) != before
    run.stop.end_training(run.state, run.logger)
    assert signal.getsignal(signal.SIGTERM) == before
