"""Metrics as JSON lines: what plots and scripts read."""

import contextlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from composer.callbacks import CheckpointSaver
from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist, parse_uri

from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import download

__all__ = ["JSONLLogger", "read_jsonl"]

LARGEST_STEP = 1 << 40

log = logging.getLogger(__name__)


class JSONLLogger(LoggerDestination):
    """One line per call of ``log_metrics``: ``{"step": batch, key: value, …}``, written by rank 0.

    A restart appends (Composer's FileLogger starts the file anew and loses what was in it), so that batches after
    the last checkpoint stand there twice: the later line counts, see :func:`read_jsonl`.

    Args:
        filename: Where; folders are made.
        remote: Its address in the checkpoints' object store, or ``None``. Uploaded after each checkpoint and when the
            run ends, by an error as well; fetched from there where a restart on another machine has no file to append
            to.
    """

    def __init__(self, filename: str, remote: str | None = None) -> None:
        self.path = Path(filename)
        self.remote = remote
        self.file: TextIO | None = None
        self.has_news = False
        self.saver: CheckpointSaver | None = None
        self.num_saved = 0

    def init(self, state: State, logger: Logger) -> None:
        self.saver = next((each for each in state.callbacks if isinstance(each, CheckpointSaver)), None)
        if self.remote is not None and dist.get_global_rank() == 0 and not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(InputError):  # the first start: there is none
                download(self.remote, self.path, timeout=60)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if dist.get_global_rank() != 0 or not metrics:
            return
        if self.file is None:  # opened with the first line: a run that cannot start leaves no file
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a", buffering=1)  # a line reaches the file when it is complete
        numbers = {key: value.item() if hasattr(value, "item") else value for key, value in metrics.items()}
        self.file.write(json.dumps({"step": step, **numbers}) + "\n")
        self.has_news = True

    def batch_start(self, state: State, logger: Logger) -> None:
        # The first event after that of a checkpoint.
        if self.saver is not None and len(self.saver.saved_checkpoints) != self.num_saved:
            self.num_saved = len(self.saver.saved_checkpoints)
            self._upload(logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        self._upload(logger)

    def close(self, state: State, logger: Logger) -> None:
        self._upload(logger)
        if self.file is not None:
            self.file.close()
            self.file = None

    def _upload(self, logger: Logger) -> None:
        if self.remote is not None and self.has_news and self.path.exists():
            self.has_news = False
            logger.upload_file(parse_uri(self.remote)[2], self.path, overwrite=True)


def read_jsonl(path: Path) -> dict[str, dict[int, float]]:
    """key → step → value of a log; where a restart wrote a step again, the later value.

    Lines that are damaged, such as the one during which a process was killed, are left out with a warning.
    """
    series: dict[str, dict[int, float]] = {}
    lines = path.read_bytes().splitlines()
    damaged = 0
    for line in lines:
        entry = _parse_line(line)
        if entry is None:
            damaged += 1
            continue
        step = entry.pop("step")
        for key, value in entry.items():
            series.setdefault(key, {})[step] = value
    if damaged:
        log.warning("%s: %d of %d lines are damaged and left out", path, damaged, len(lines))
    return series


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """A step and numbers by their names; ``None`` where a line is anything else."""
    try:
        entry = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not all(_is_number(value) for value in entry.values()):
        return None
    step = entry.get("step")
    return entry if isinstance(step, int) and 0 <= step <= LARGEST_STEP else None


def _is_number(value: Any) -> bool:
    """Whether a plot can show it; Python reads whole numbers of any size, and NaN."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 1000)
