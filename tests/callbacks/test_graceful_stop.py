"""A signal cuts a measurement short, and nothing else of a retrieval; the last batch is finished."""

import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.core import Precision
from composer.utils import dist

from d2v_composer.callbacks import GracefulStop, ZeroShotRetrieval, checkpointing
from helpers import wait_until

LAST_BATCH = 5


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
        self.while_measuring()
        return {None: {"accuracy": 0.5}}

    def log_metrics(self, metrics: dict[str, float]) -> None:
        self.while_logging()
        self.logged.append(metrics)

    def end_batch(self, batch: int) -> None:
        self.state.timestamp = Timestamp(batch)
        self.stop.batch_end(self.state, self.logger)
        self.retrieval.evaluate(self.state, self.logger)


class Timestamp(int):
    """The number of a batch, as Composer gives it."""

    @property
    def batch(self) -> int:
        return int(self)


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.setattr(checkpointing, "NOTICE_SECONDS", 1000.0)
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield Run()
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_a_measurement_is_cut_short(run: Run) -> None:
    run.while_measuring = ctrl_c
    run.end_batch(3)
    assert run.stop.retrieval_is_missing
    assert run.stop.stopped_by == signal.SIGINT
    assert run.retrieval.history == run.logged == []


def test_what_was_measured_is_recorded(run: Run) -> None:
    run.while_logging = lambda: signal.raise_signal(signal.SIGTERM)
    run.end_batch(3)
    assert not run.stop.retrieval_is_missing
    assert [entry["batch"] for entry in run.retrieval.history] == [3]
    assert [list(metrics) for metrics in run.logged] == [["time/zero_shot_retrieval"], ["accuracy"]]
    run.end_batch(4)
    assert run.stop.stopped_by == signal.SIGTERM
    assert run.stop.retrieval_is_missing


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_in_the_last_batch_the_retrieval_is_finished_and_the_run_exits(run: Run, signum: signal.Signals) -> None:
    run.while_measuring = lambda: signal.raise_signal(signum)
    run.end_batch(LAST_BATCH)
    assert [entry["batch"] for entry in run.retrieval.history] == [LAST_BATCH]
    assert not run.stop.retrieval_is_missing
    with pytest.raises(SystemExit) as ended:
        run.stop.end_training(run.state, run.logger)
    assert ended.value.code == 128 + signum


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_before_the_first_batch_and_after_the_last_a_signal_ends_the_run_at_once(
    run: Run, signum: signal.Signals
) -> None:
    def end_at_once(*_: Any) -> None:
        raise KeyboardInterrupt

    run.stop.previous[signum] = end_at_once
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signum)
    run.end_batch(LAST_BATCH)
    run.stop.end_training(run.state, run.logger)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signum)


def test_a_signal_while_the_ranks_agree_waits_until_they_have(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that left before would fail the others, which wait for it."""
    events: list[str] = []

    def end_at_once(*_: Any) -> None:
        events.append("ended")
        raise KeyboardInterrupt

    def get_world_size() -> int:
        ctrl_c()
        events.append("agreed")
        return 1

    run.stop.previous[signal.SIGINT] = end_at_once
    run.end_batch(LAST_BATCH)
    monkeypatch.setattr(dist, "get_world_size", get_world_size)
    with pytest.raises(KeyboardInterrupt):
        run.stop.end_training(run.state, run.logger)
    assert events == ["agreed", "ended"]


@pytest.mark.parametrize(
    ("batch", "line"), [(3, checkpointing.NOTICE), (LAST_BATCH, checkpointing.LAST_NOTICE)], ids=["earlier", "last"]
)
def test_the_notice_tells_what_ctrl_c_waits_for(
    run: Run, batch: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(checkpointing, "show", shown.append)
    monkeypatch.setattr(checkpointing, "NOTICE_SECONDS", 0.0)
    run.end_batch(batch)
    ctrl_c()
    wait_until(lambda: shown == [line])
