"""Loggers of a run: progress, JSON lines and MLflow; and the throughput that they show."""

import json
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from composer.core import Callback, Event, State, Time, TimeUnit
from composer.loggers import Logger, LoggerDestination, MLFlowLogger, RemoteUploaderDownloader
from composer.utils import dist, parse_uri
from tqdm import tqdm

from d2v_composer.callbacks.trainer_state import SavedCheckpoints, due_every
from d2v_composer.system.errors import reading
from d2v_composer.system.fetch import download_existing
from d2v_composer.system.ranks import rank_zero_first

# metrics/DATASET/[BASELINE/]bank_train/topK: the accuracy of the primary embedding.
RETRIEVED = re.compile(r"metrics/([^/]+)/(?:([^/]+)/)?bank_train/top(\d+)")
# The accuracy of a fine-tuned classifier.
CLASSIFIED = re.compile(r"metrics/test/top(\d+)")
# An accuracy, and those of several embeddings below it.
BELOW_AN_ACCURACY = re.compile(r"(/top\d+)/")
# Logged number → how progress shows it.
SHOWN = {
    "loss/train/total": "loss {:.4f}",
    "throughput/images_per_sec": "{:.0f} images/s",
    "throughput/data_wait": "data wait {:.0%}",
}
SECONDS_BETWEEN_LINES = 10.0
POLL_SECONDS = 0.2


class ProgressLogger(LoggerDestination):
    """Show loss, images/s, the share of waiting for data, the latest retrieval and the time left, on rank 0.

    Each retrieval, and each evaluation of a classifier, also has a line of its own.

    The numbers are those that the Trainer, :class:`~d2v_composer.callbacks.Throughput` and
    :class:`~d2v_composer.callbacks.ZeroShotRetrieval` log; missing ones are omitted.

    Args:
        bar: Show a bar, which needs a terminal.
        lines_interval: Longest interval of the printed lines, a Composer time string; a line follows another within
            ten seconds and a batch in any case. ``None``: print none.
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
        self.started_at = self.last_line_at = 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        self.first_batch = self.last_line = int(state.timestamp.batch)
        self.started_at = self.last_line_at = time.monotonic()
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
        when = "" if step is None else f" at batch {step}"
        if top_k := classified(metrics):
            self.write(f"evaluation{when}: {', '.join(top_k)}")
        found: dict[str, list[str]] = {}
        for (dataset, baseline), (k, accuracy) in retrieved(metrics).items():
            found.setdefault(f"{dataset} top-{k}", []).append(f"{baseline or 'student'} {accuracy:.1%}")
        for measured, values in found.items():
            self.write(f"retrieval{when}: {measured}: {', '.join(values)}")

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
        batch, total, now = int(state.timestamp.batch), num_batches(state), time.monotonic()
        # A line may have been printed at the end of the batch, or the run was resumed at the end of an epoch.
        if self.line_is_due is None or batch == self.last_line:
            return
        if not self.line_is_due(state, event) and now - self.last_line_at < SECONDS_BETWEEN_LINES:
            return
        self.last_line, self.last_line_at = batch, now
        left = (now - self.started_at) / (batch - self.first_batch) * (total - batch)
        place = f"batch {batch}/{total} ({100 * batch // total} %)"
        self.write("  ".join([place, *self.status(), f"left {tqdm.format_interval(left)}"]))

    def write(self, line: str) -> None:
        """Print a line on rank 0, above the bar."""
        if dist.get_global_rank() == 0:
            tqdm.write(line, file=self.stream)
            self.stream.flush()

    def status(self) -> list[str]:
        """Return the latest numbers that were logged."""
        known = [template.format(self.latest[key]) for key, template in SHOWN.items() if key in self.latest]
        latest = {dataset: value for (dataset, baseline), value in retrieved(self.latest).items() if not baseline}
        known += classified(self.latest)[:1]
        return known + [f"{dataset} top-{k} {accuracy:.1%}" for dataset, (k, accuracy) in latest.items()]


def retrieved(metrics: Mapping[str, Any]) -> dict[tuple[str, str], tuple[int, float]]:
    """Map data set and baseline ('' for the model) to the smallest k and its accuracy, with the primary embedding."""
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for key, accuracy in metrics.items():
        if (match := RETRIEVED.fullmatch(key)) is not None:
            name, k = (match[1], match[2] or ""), int(match[3])
            found[name] = min(found.get(name, (k, accuracy)), (k, accuracy))
    return found


def classified(metrics: Mapping[str, Any]) -> list[str]:
    """Return the accuracies of a classifier, by k."""
    return [
        f"top-{match[1]} {metrics[key]:.1%}"
        for key in sorted(metrics)
        if (match := CLASSIFIED.fullmatch(key)) is not None
    ]


def num_batches(state: State) -> int:
    """Return the number of batches of the whole run."""
    duration = state.max_duration
    assert isinstance(duration, Time)
    if duration.unit == TimeUnit.BATCH:
        return duration.value
    assert duration.unit == TimeUnit.EPOCH
    assert state.dataloader_len is not None
    return duration.value * int(state.dataloader_len)


class JSONLLogger(LoggerDestination):
    """Write one line per call of ``log_metrics``, on rank 0: ``{"step": batch, key: value, …}``.

    A restart appends (Composer's FileLogger overwrites the file), so that the batches after the last checkpoint are
    logged twice: the later line counts, see :func:`~d2v_composer.evaluation.metrics.read_jsonl`.

    Args:
        filename: The file; missing folders are created.
        remote: Its address in the checkpoints' object store, or ``None``. The file is uploaded after each checkpoint
            and at the end of the run, even after an error. A restart takes over what other machines have logged there.
    """

    def __init__(self, filename: str, remote: str | None = None) -> None:
        self.path = Path(filename)
        self.remote = remote
        self.file: TextIO | None = None
        self.has_news = False
        self.saved: SavedCheckpoints | None = None

    def init(self, state: State, logger: Logger) -> None:
        self.saved = SavedCheckpoints(state)

    def after_load(self, state: State, logger: Logger) -> None:
        """Take over the store's log if the run resumes and that log is the longer one: another machine went on.

        Raises:
            InputError: It cannot be read, and the next upload would replace it.
        """
        if self.remote is None or dist.get_global_rank() != 0 or state.timestamp.batch == 0:
            return
        self._close()
        stored = self.path.with_name(f"{self.path.name}.stored")
        with reading(self.remote):
            is_stored = download_existing(self.remote, stored)
        if is_stored and (not self.path.exists() or stored.stat().st_size > self.path.stat().st_size):
            stored.replace(self.path)
        stored.unlink(missing_ok=True)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if dist.get_global_rank() != 0 or not metrics:
            return
        if self.file is None:  # opened with the first line, so that a run that fails to start leaves no file
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a", buffering=1)  # write whole lines
        numbers = {key: value.item() if hasattr(value, "item") else value for key, value in metrics.items()}
        self.file.write(json.dumps({"step": step, **numbers}) + "\n")
        self.has_news = True

    def batch_start(self, state: State, logger: Logger) -> None:
        if self.saved is not None and self.saved.has_new():
            self._upload(logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        self._upload(logger)
        if self.remote is not None:
            with rank_zero_first("the upload of the log"):
                wait_for_uploads(logger)

    def close(self, state: State, logger: Logger) -> None:
        self._upload(logger)
        self._close()

    def _close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def _upload(self, logger: Logger) -> None:
        if self.remote is not None and self.has_news and self.path.exists():
            self.has_news = False
            logger.upload_file(parse_uri(self.remote)[2], self.path, overwrite=True)


def wait_for_uploads(logger: Logger) -> None:
    """Wait until all uploads have started, or failed; Composer waits too, but while other ranks are in a collective."""
    for uploader in logger.destinations:
        if isinstance(uploader, RemoteUploaderDownloader):
            while uploader._logged_objects and uploader._exception_queue.empty():
                time.sleep(POLL_SECONDS)


class RunMLFlowLogger(MLFlowLogger):
    """Composer's MLFlowLogger, with ``…/top1.output_cls`` instead of ``…/top1/output_cls``.

    MLflow's store of files keeps each metric as a file of that name. ``top1`` would be a file and a folder, and MLflow
    silently loses all metrics of a call in which one cannot be written. It writes ``#`` for a ``/`` in a picture's
    name, and cannot read such files.
    """

    def rename(self, key: str) -> str:
        return super().rename(BELOW_AN_ACCURACY.sub(r"\1.", key))

    def log_images(self, images: Any, name: str = "image", *others: Any, **named: Any) -> None:
        super().log_images(images, name.replace("/", "."), *others, **named)


class Throughput(Callback):
    """Log the speed of training at a fixed interval, without evaluations and checkpoints.

    Composer's SpeedMonitor counts those as training time. Logged, as means over the interval:

    - ``throughput/images_per_sec``: over all ranks;
    - ``throughput/data_wait``: the share of the time, from 0 to 1, in which rank 0 waited for its next images.

    Pass it to the Trainer before callbacks that take time at the end of a batch.

    Args:
        every: Interval in batches.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = every
        self.asked_at = self.got_at = 0.0
        self.images_before = 0
        self.reset()

    def reset(self) -> None:
        """Start a new mean."""
        self.images, self.seconds, self.waited = 0, 0.0, 0.0

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self.asked_at = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self.got_at = time.perf_counter()
        self.images_before = int(state.timestamp.sample)

    def batch_end(self, state: State, logger: Logger) -> None:
        self.images += int(state.timestamp.sample) - self.images_before
        self.seconds += time.perf_counter() - self.asked_at
        self.waited += self.got_at - self.asked_at
        if int(state.timestamp.batch) % self.every == 0:
            logger.log_metrics(
                {
                    "throughput/images_per_sec": self.images / self.seconds,
                    "throughput/data_wait": self.waited / self.seconds,
                }
            )
            self.reset()
