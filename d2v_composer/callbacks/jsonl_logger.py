"""Log metrics as JSON lines, for plots and scripts."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist, parse_uri

from d2v_composer.callbacks.trainer_state import SavedCheckpoints
from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import download

__all__ = ["JSONLLogger"]


class JSONLLogger(LoggerDestination):
    """Write one line per call of ``log_metrics``, on rank 0: ``{"step": batch, key: value, …}``.

    A restart appends (Composer's FileLogger overwrites the file), so that the batches after the last checkpoint are
    logged twice: the later line counts, see :func:`~d2v_composer.evaluation.metrics_log.read_jsonl`.

    Args:
        filename: The file; missing folders are created.
        remote: Its address in the checkpoints' object store, or ``None``. The file is uploaded after each checkpoint
            and at the end of the run, even after an error. A restart on another machine downloads it first.
    """

    def __init__(self, filename: str, remote: str | None = None) -> None:
        self.path = Path(filename)
        self.remote = remote
        self.file: TextIO | None = None
        self.has_news = False
        self.saved: SavedCheckpoints | None = None

    def init(self, state: State, logger: Logger) -> None:
        self.saved = SavedCheckpoints(state)
        if self.remote is not None and dist.get_global_rank() == 0 and not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(InputError):  # none exists at the first start
                download(self.remote, self.path, timeout=60)

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

    def close(self, state: State, logger: Logger) -> None:
        self._upload(logger)
        if self.file is not None:
            self.file.close()
            self.file = None

    def _upload(self, logger: Logger) -> None:
        if self.remote is not None and self.has_news and self.path.exists():
            self.has_news = False
            logger.upload_file(parse_uri(self.remote)[2], self.path, overwrite=True)
