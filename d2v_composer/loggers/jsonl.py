"""Metrics as JSON lines: what plots and scripts read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

__all__ = ["JSONLLogger", "read_jsonl"]


class JSONLLogger(LoggerDestination):
    """One line per call of ``log_metrics``: ``{"step": batch, key: value, …}``, written by rank 0.

    A restart appends (Composer's FileLogger starts the file anew and loses what was in it), so that batches after
    the last checkpoint stand there twice: the later line counts, see :func:`read_jsonl`.

    Args:
        filename: Where; folders are made.
        remote_file_name: Its name in the checkpoints' object store, uploaded at each epoch's end and at the run's, or
            ``None``.
    """

    def __init__(self, filename: str, remote_file_name: str | None = None) -> None:
        self.path = Path(filename)
        self.remote_file_name = remote_file_name
        self.file: TextIO | None = None

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if dist.get_global_rank() != 0 or not metrics:
            return
        if self.file is None:  # opened with the first line: a run that cannot start leaves no file
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a", buffering=1)  # a line reaches the file when it is complete
        numbers = {key: value.item() if hasattr(value, "item") else value for key, value in metrics.items()}
        self.file.write(json.dumps({"step": step, **numbers}) + "\n")

    def epoch_end(self, state: State, logger: Logger) -> None:
        self._upload(logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        self._upload(logger)

    def close(self, state: State, logger: Logger) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def _upload(self, logger: Logger) -> None:
        if self.file is not None and self.remote_file_name is not None:
            logger.upload_file(self.remote_file_name, self.path, overwrite=True)


def read_jsonl(path: Path) -> dict[str, dict[int, float]]:
    """key → step → value of a log; where a restart wrote a step again, the later value."""
    series: dict[str, dict[int, float]] = {}
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the line during which a process was killed
            continue
        step = entry.pop("step")
        for key, value in entry.items():
            series.setdefault(key, {})[step] = value
    return series
