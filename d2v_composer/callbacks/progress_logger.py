"""Show a run's progress: a bar on a terminal, plain lines in a pipe or a log file."""

import re
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from composer.core import Event, State, Time, TimeUnit
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist
from tqdm import tqdm

from d2v_composer.callbacks.trainer_state import due_every

__all__ = ["ProgressLogger", "num_batches"]

# metrics/DATASET/[REFERENCE/]bank_train/topK: the accuracy of the headline embedding.
TOP_K = re.compile(r"metrics/([^/]+)/(?:([^/]+)/)?bank_train/top(\d+)")

# Of a fine-tuned classifier.
CLASSIFIED = re.compile(r"metrics/test/top(\d+)")


class ProgressLogger(LoggerDestination):
    """Show loss, images/s, the share of waiting for data, the latest retrieval and the time left, on rank 0.

    Each retrieval, and each evaluation of a classifier, also has a line of its own.

    The numbers are those that the Trainer, :class:`~d2v_composer.callbacks.Throughput` and
    :class:`~d2v_composer.callbacks.ZeroShotRetrieval` log; missing ones are omitted.

    Args:
        bar: Show a bar, which needs a terminal.
        lines_interval: Interval of the printed lines, a Composer time string; ``None``: print none.
        stream: Output stream; default stderr.
    """

    def __init__(self, bar: bool, lines_interval: str | None, stream: TextIO | None = None) -> None:
        self.shows_bar = bar
        final_events = {Event.BATCH_END, Event.EPOCH_END}
        self.line_is_due = None if lines_interval is None else due_every(lines_interval, final_events)
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
        found: dict[str, list[str]] = {}
        for (dataset, reference), (k, accuracy) in accuracies(metrics).items():
            found.setdefault(f"{dataset} top-{k}", []).append(f"{reference or 'student'} {100 * accuracy:.1f}%")
        if top_k := [f"top-{match[1]} {100 * value:.1f}%" for match, value in classified(metrics)]:
            self.write(f"evaluation{'' if step is None else f' at batch {step}'}: {', '.join(top_k)}")
        for measured, values in found.items():
            self.write(f"retrieval{'' if step is None else f' at batch {step}'}: {measured}: {', '.join(values)}")

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
        """Print one plain line, if it is due."""
        if self.line_is_due is None or dist.get_global_rank() != 0 or not self.line_is_due(state, event):
            return
        batch, total = int(state.timestamp.batch), num_batches(state)
        if batch == self.last_line:  # printed at the end of the batch, or the run was resumed at the end of an epoch
            return
        self.last_line = batch
        left = (time.monotonic() - self.started_at) / (batch - self.first_batch) * (total - batch)
        place = f"batch {batch}/{total} ({100 * batch // total} %)"
        self.write("  ".join([place, *self.status(), f"left {tqdm.format_interval(left)}"]))

    def write(self, line: str) -> None:
        """Print a line on rank 0, above the bar."""
        if dist.get_global_rank() == 0:
            tqdm.write(line, file=self.stream)
            self.stream.flush()

    def status(self) -> list[str]:
        """Return the latest numbers that were logged."""
        templates = {
            "loss/train/total": "loss {:.4f}",
            "throughput/images_per_sec": "{:.0f} images/s",
            "throughput/data_wait": "data wait {:.0%}",
        }
        known = [template.format(self.latest[key]) for key, template in templates.items() if key in self.latest]
        latest = {name: value for (name, reference), value in accuracies(self.latest).items() if not reference}
        known += [f"top-{match[1]} {100 * value:.1f}%" for match, value in classified(self.latest)[:1]]
        return known + [f"{name} top-{k} {100 * accuracy:.1f}%" for name, (k, accuracy) in latest.items()]


def accuracies(metrics: Mapping[str, Any]) -> dict[tuple[str, str], tuple[int, float]]:
    """Map data set and reference ('' for the model) to the smallest k and its accuracy, with the headline embedding."""
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for key, accuracy in metrics.items():
        if (match := TOP_K.fullmatch(key)) is not None:
            name, k = (match[1], match[2] or ""), int(match[3])
            found[name] = min(found.get(name, (k, accuracy)), (k, accuracy))
    return found


def classified(metrics: Mapping[str, Any]) -> list[tuple[re.Match[str], float]]:
    """Return the accuracies of a classifier, each with the match of its key, by k."""
    return [(match, metrics[key]) for key in sorted(metrics) if (match := CLASSIFIED.fullmatch(key)) is not None]


def num_batches(state: State) -> int:
    """Return the number of batches of the whole run."""
    duration = state.max_duration
    assert isinstance(duration, Time)
    if duration.unit == TimeUnit.BATCH:
        return duration.value
    assert duration.unit == TimeUnit.EPOCH
    assert state.dataloader_len is not None
    return duration.value * int(state.dataloader_len)
