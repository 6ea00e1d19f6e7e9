"""Log metrics as JSON lines, for plots and scripts, and read them."""

import contextlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist, parse_uri

from d2v_composer.callbacks.trainer_state import SavedCheckpoints
from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import download

__all__ = ["JSONLLogger", "read_jsonl"]

LARGEST_STEP = 1 << 40

log = logging.getLogger(__name__)


class JSONLLogger(LoggerDestination):
    """Write one line per call of ``log_metrics``, on rank 0: ``{"step": batch, key: value, …}``.

    A restart appends (Composer's FileLogger overwrites the file), so that the batches after the last checkpoint are
    logged twice: the later line counts, see :func:`read_jsonl`.

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


def read_jsonl(path: Path) -> dict[str, dict[int, float]]:
    """Read a log as key → step → value; of a step that a restart logged again, the later value.

    Corrupt lines, such as one truncated by a kill, are skipped with a warning.
    """
    series: dict[str, dict[int, float]] = {}
    lines = path.read_bytes().splitlines()
    num_corrupt = 0
    for line in lines:
        entry = _parse_line(line)
        if entry is None:
            num_corrupt += 1
            continue
        step = entry.pop("step")
        for key, value in entry.items():
            series.setdefault(key, {})[step] = value
    if num_corrupt:
        log.warning("%s: skipped %d of %d lines: corrupt", path, num_corrupt, len(lines))
    return series


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """Return the step and the numbers by name; ``None`` for any other line."""
    try:
        entry = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not all(_is_number(value) for value in entry.values()):
        return None
    step = entry.get("step")
    return entry if isinstance(step, int) and 0 <= step <= LARGEST_STEP else None


def _is_number(value: Any) -> bool:
    """Tell whether a plot can show the value; Python parses integers of any size, and NaN."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 1000)
