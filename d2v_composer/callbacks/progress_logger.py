"""Where a run stands, in one line: a bar on a terminal, plain lines in a pipe or a log file."""

import re
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from composer.core import Event, State, Time, TimeUnit
from composer.loggers import Logger, LoggerDestination
from composer.utils import create_interval_scheduler, dist
from tqdm import tqdm

__all__ = ["ProgressLogger"]

TOP_K = re.compile(r"metrics/([^/]+)/bank_train/top(\d+)")


class ProgressLogger(LoggerDestination):
    """Loss, images/s, the share of waiting for data, the latest retrieval, and the time that is left; rank 0's.

    It shows what others log: ``loss/train/total``, :class:`~d2v_composer.callbacks.Throughput`'s and
    :class:`~d2v_composer.callbacks.ZeroShotRetrieval`'s numbers; what nobody logs is left out.

    Args:
        bar: Whether there is a bar; it wants a terminal.
        lines_interval: How often a line is printed, a Composer time string; ``None``: never.
        stream: Where to; default stderr.
    """

    def __init__(self, bar: bool, lines_interval: str | None, stream: TextIO | None = None) -> None:
        self.shows_bar = bar
        self.line_is_due = None
        if lines_interval is not None:
            self.line_is_due = create_interval_scheduler(
                lines_interval, checkpoint_events=False, final_events={Event.BATCH_END, Event.EPOCH_END}
            )
        self.stream = stream or sys.stderr
        self.bar: tqdm | None = None
        self.latest: dict[str, float] = {}
        self.first_batch = self.last_line = 0
        self.started_at = 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        self.first_batch = self.last_line = int(state.timestamp.batch)
        self.started_at = time.monotonic()
        if self.shows_bar and dist.get_global_rank() == 0:
            self.bar = tqdm(
                desc=state.run_name,
                total=num_batches(state),
                initial=self.first_batch,
                unit="ba",
                file=self.stream,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.latest |= metrics

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(", ".join(self.status()), refresh=False)
            self.bar.update(int(state.timestamp.batch) - self.bar.n)
        self.print_line(state, Event.BATCH_END)

    def epoch_end(self, state: State, logger: Logger) -> None:
        self.print_line(state, Event.EPOCH_END)

    def close(self, state: State, logger: Logger) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def print_line(self, state: State, event: Event) -> None:
        """One plain line, if it is time."""
        if self.line_is_due is None or dist.get_global_rank() != 0 or not self.line_is_due(state, event):
            return
        batch, total = int(state.timestamp.batch), num_batches(state)
        if batch == self.last_line:  # a batch's end may be its epoch's as well, also that of a run that goes on there
            return
        self.last_line = batch
        left = (time.monotonic() - self.started_at) / (batch - self.first_batch) * (total - batch)
        place = f"batch {batch}/{total} ({100 * batch // total} %)"
        # Above the bar, where there is one.
        tqdm.write("  ".join([place, *self.status(), f"left {tqdm.format_interval(left)}"]), file=self.stream)
        self.stream.flush()

    def status(self) -> list[str]:
        """The latest numbers, as far as they are known."""
        templates = {
            "loss/train/total": "loss {:.4f}",
            "throughput/images_per_sec": "{:.0f} images/s",
            "throughput/data_wait": "data wait {:.0%}",
        }
        known = [template.format(self.latest[key]) for key, template in templates.items() if key in self.latest]
        return known + [f"{name} top-{k} {100 * self.latest[key]:.1f}%" for name, (k, key) in self.accuracies().items()]

    def accuracies(self) -> dict[str, tuple[int, str]]:
        """Of each data set, its smallest k with the headline's key."""
        found: dict[str, tuple[int, str]] = {}
        for key in self.latest:
            if (match := TOP_K.fullmatch(key)) is not None:
                name, k = match[1], int(match[2])
                found[name] = min(found.get(name, (k, key)), (k, key))
        return found


def num_batches(state: State) -> int:
    """How many the run has in all."""
    duration = state.max_duration
    assert isinstance(duration, Time)
    if duration.unit == TimeUnit.BATCH:
        return duration.value
    assert duration.unit == TimeUnit.EPOCH
    assert state.dataloader_len is not None
    return duration.value * int(state.dataloader_len)
