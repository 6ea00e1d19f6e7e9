"""Log metrics as JSON lines, for plots and scripts."""

import json
import time
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, TextIO

from composer.core import State
from composer.loggers import Logger, LoggerDestination, RemoteUploaderDownloader
from composer.utils import dist, parse_uri

from d2v_composer.callbacks.trainer_state import SavedCheckpoints
from d2v_composer.system.atomic_files import partial_file
from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import download_existing
from d2v_composer.system.multi_node import rank_zero_first
from d2v_composer.system.retry import reason

__all__ = ["JSONLLogger"]

POLL_SECONDS = 0.2


class JSONLLogger(LoggerDestination):
    """Write one line per call of ``log_metrics``, on rank 0: ``{"step": batch, key: value, …}``.

    A restart appends (Composer's FileLogger overwrites the file), so that the batches after the last checkpoint are
    logged twice: the later line counts, see :func:`~d2v_composer.evaluation.metrics_log.read_jsonl`.

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
        """Take over the store's log, if the run resumes.

        Raises:
            InputError: It cannot be read, and the next upload would replace it.
        """
        if self.remote is not None and dist.get_global_rank() == 0 and state.timestamp.batch > 0:
            self._close()
            take_over(self.remote, self.path)

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
    """Wait until Composer has begun all uploads, or failed; it waits too, but while other ranks are in a collective."""
    for uploader in logger.destinations:
        if isinstance(uploader, RemoteUploaderDownloader):
            while uploader._logged_objects and uploader._exception_queue.empty():
                time.sleep(POLL_SECONDS)


def take_over(remote: str, path: Path) -> None:
    """Add to a log the lines of the store's that it lacks: another machine has logged them since.

    Raises:
        InputError: The store's log cannot be read.
    """
    stored = path.with_name(f"{path.name}.stored")
    try:
        if not download_existing(remote, stored):
            return
    except Exception as error:
        raise InputError(f"{remote}: the run's log cannot be read ({reason(error)})") from error
    ours, theirs = (file.read_bytes().splitlines() if file.exists() else [] for file in (path, stored))
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))
    with partial_file(path) as merged:  # of a step logged twice, the later line counts
        merged.write_bytes(b"".join(line + b"\n" for line in [*ours, *theirs[common:]]))
    stored.unlink()
