"""Log a run's progress, metrics and throughput, and upload the run's files."""

import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO, cast

from composer.callbacks.speed_monitor import get_gpu_flops_available
from composer.core import Callback, State, Time, TimeUnit
from composer.loggers import Logger, LoggerDestination, MLFlowLogger
from composer.utils import dist
from tqdm import tqdm

from d2v_composer.callbacks.trainer_state import unwrapped
from d2v_composer.evaluation.run_log import read_lines
from d2v_composer.system.errors import RunError, writing
from d2v_composer.system.fetch import put
from d2v_composer.system.files import write_atomically
from d2v_composer.system.progress import Lines

# Keys of the accuracies that progress shows, of the headline; metrics/test/… is of a fine-tuned classifier.
ACCURACY = re.compile(r"metrics/(test|.+/(bank_train|instance))/top\d+|metrics/.+/agreement@\d+|metrics/test/map_50")
# The part of a key between an accuracy's name and the embedding's.
BELOW_AN_ACCURACY = re.compile(r"(/top\d+|@\d+)/")
# Logged number → how progress shows it.
SHOWN = {
    "loss/train/total": "loss {:.4f}",
    "throughput/samples_per_sec": "{:.0f} {unit}/s",
    "throughput/data_wait": "data wait {:.0%}",
}
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
LINE = "batch {n_fmt}/{total_fmt} ({percentage:.0f} %)  {desc}  left {remaining}"

log = logging.getLogger(__name__)


class ProgressLogger(LoggerDestination):
    """Show on rank 0 the time left, the loss, the speed, the share of time spent waiting for data, and accuracies.

    An accuracy is shown if its key matches the regular expression ``ACCURACY``.

    The speed and the share are logged by :class:`~d2v_composer.callbacks.Throughput`, and accuracies of retrieval by
    :class:`~d2v_composer.callbacks.ZeroShotRetrieval`.

    Args:
        bar: True: show a progress bar; False: print a line every ten seconds and at the end.
        stream: Output stream; default: stderr.
        unit: Name of the samples in the speed, such as "images".

    Example:
        >>> from d2v_composer.callbacks import ProgressLogger, Throughput
        >>> loggers = [ProgressLogger(bar=False)]
        >>> callbacks = [Throughput(every=10)]  # Trainer(loggers=loggers, callbacks=callbacks, progress_bar=False)
    """

    def __init__(self, bar: bool, stream: TextIO | None = None, unit: str = "images") -> None:
        self.shows_bar = bar
        self.unit = unit
        self.stream = stream or sys.stderr
        self.bar: tqdm | None = None
        self.latest: dict[str, float] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            options = {"total": num_batches(state), "initial": int(state.timestamp.batch), "file": self.stream}
            if self.shows_bar:
                self.bar = tqdm(desc=state.run_name, dynamic_ncols=True, bar_format=BAR, **options)
            else:
                self.bar = Lines(bar_format=LINE, smoothing=0, **options)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.latest |= metrics
        for key, accuracy in metrics.items():
            if ACCURACY.fullmatch(key) and dist.get_global_rank() == 0:
                tqdm.write(f"batch {step}: {key} {accuracy:.1%}", file=self.stream)
                self.stream.flush()

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.bar is None:
            return
        if self.shows_bar:
            self.bar.set_postfix_str(", ".join(self.status()), refresh=False)
        else:
            self.bar.set_description_str("  ".join(self.status()), refresh=False)
        if not self.bar.update() and self.bar.n == self.bar.total:
            self.bar.refresh()

    def close(self, state: State, logger: Logger) -> None:
        if self.bar is not None:
            self.bar.close()

    def status(self) -> list[str]:
        return [
            template.format(self.latest[key], unit=self.unit) for key, template in SHOWN.items() if key in self.latest
        ]


def num_batches(state: State) -> int:
    """Return the number of batches in the whole run."""
    duration = state.max_duration
    assert isinstance(duration, Time)
    batches = {TimeUnit.BATCH: 1, TimeUnit.EPOCH: int(state.dataloader_len or 0)}
    return duration.value * batches[duration.unit]


class JSONLLogger(LoggerDestination):
    """Write a JSON line for each call of ``log_metrics``, on rank 0: ``{"step": batch, key: value, …}``.

    A resumed run first removes the lines of the batches that it repeats, then appends lines.

    Args:
        filename: Path of the file; missing folders are created.

    Example:
        >>> from d2v_composer.callbacks import JSONLLogger
        >>> logger = JSONLLogger("runs/mine/log.jsonl")  # Trainer(loggers=[logger])
    """

    def __init__(self, filename: str) -> None:
        self.path = Path(filename)
        self.file: TextIO | None = None

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if dist.get_global_rank() != 0 or not metrics:
            return
        numbers = {key: value.item() if hasattr(value, "item") else value for key, value in metrics.items()}
        with writing(self.path):
            if self.file is None:  # opened with the first line, so that a run that fails to start leaves no file
                self.path.parent.mkdir(parents=True, exist_ok=True)
                if step and self.path.exists():  # a resume
                    kept = [line + b"\n" for line, batch, _ in read_lines(self.path) if batch <= step]
                    write_atomically(self.path, b"".join(kept))
                self.file = self.path.open("a", buffering=1)  # write whole lines
            self.file.write(json.dumps({"step": step, **numbers}) + "\n")

    def close(self, state: State, logger: Logger) -> None:
        if self.file is not None:
            if self.path.is_file():  # /dev/null cannot be flushed
                os.fsync(self.file.fileno())  # the lines after the last checkpoint are in no other file
            self.file.close()
            self.file = None


class Uploads(LoggerDestination):
    """Upload a run's files to the run's folder in a store, one after another, in a thread.

    Args:
        address: Address of the run's folder in the store.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.thread = ThreadPoolExecutor(1, "uploads")
        self.tasks: list[Future[None]] = []
        self.has_failed = False

    def can_upload_files(self) -> bool:
        return True

    def upload_file(self, state: State, remote_file_name: str, file_path: Path, *, overwrite: bool = False) -> None:
        self.start(put, Path(file_path), f"{self.address}/{remote_file_name}", True)

    def upload(self, path: Path) -> None:
        """Upload a file of the run's folder, if the file exists."""
        if path.exists():
            put(path, f"{self.address}/{path.name}", denial_passes=True)

    def start(self, task: Callable[..., None], *arguments: Any) -> None:
        """Run a task in the thread, unless an earlier task has failed."""

        def run() -> None:
            if self.has_failed:
                return
            try:
                task(*arguments)
            except Exception:
                self.has_failed = True
                raise

        self.tasks.append(self.thread.submit(run))

    def wait(self) -> None:
        """Wait for all uploads."""
        while self.tasks:
            self.tasks.pop(0).result()

    def batch_end(self, state: State, logger: Logger) -> None:
        while self.tasks and self.tasks[0].done():
            self.tasks.pop(0).result()

    def post_close(self) -> None:
        """Wait for all uploads; a failed upload is logged."""
        try:
            self.wait()
        except RunError as error:  # raised, it could hide why a run failed
            log.warning("%s", error)


class RunMLFlowLogger(MLFlowLogger):
    """Composer's MLFlowLogger, with names of metrics that MLflow can store.

    For example, ``…/top1/output_cls`` becomes ``…/top1.output_cls``, and ``…/agreement@10`` becomes
    ``…/agreement_10``.
    """

    def rename(self, key: str) -> str:
        # MLflow's file store would need top1 as a file and a folder, and silently loses metrics that it cannot write.
        return super().rename(BELOW_AN_ACCURACY.sub(r"\1.", key).replace("@", "_"))


class Throughput(Callback):
    """Log the speed of training at a fixed interval, without the time of evaluations and checkpoints.

    Logged as means over the interval:

    - ``throughput/samples_per_sec``: samples of all ranks per second;
    - ``throughput/data_wait``: share of the time, from 0 to 1, in which rank 0 waited for batches;
    - ``throughput/device/mfu``: the model's FLOP/s as a share of the GPU's peak, if Composer knows the peak and the
      model has ``flops_per_batch``.

    Pass this callback to the Trainer before callbacks that take time at the end of a batch.

    Args:
        every: Interval in batches.

    Example:
        >>> from d2v_composer.callbacks import Throughput
        >>> throughput = Throughput(every=100)  # Trainer(callbacks=[throughput])
    """

    def __init__(self, every: int = 10) -> None:
        self.every = every
        self.asked_at = self.got_at = self.flops_at_peak = 0.0

    def reset(self, state: State) -> None:
        self.first_image, self.flops, self.seconds, self.waited = int(state.timestamp.sample), 0, 0.0, 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        self.reset(state)
        if hasattr(unwrapped(state), "flops_per_batch"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Composer does not know every GPU
                self.flops_at_peak = get_gpu_flops_available(state)

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self.asked_at = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self.got_at = time.perf_counter()

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.flops_at_peak:
            self.flops += cast("Any", unwrapped(state)).flops_per_batch(state.batch)
        self.seconds += time.perf_counter() - self.asked_at
        self.waited += self.got_at - self.asked_at
        if int(state.timestamp.batch) % self.every == 0:
            speed = (int(state.timestamp.sample) - self.first_image) / self.seconds
            metrics = {"throughput/samples_per_sec": speed, "throughput/data_wait": self.waited / self.seconds}
            if self.flops_at_peak:
                metrics["throughput/device/mfu"] = self.flops / self.seconds / self.flops_at_peak
            logger.log_metrics(metrics)
            self.reset(state)
