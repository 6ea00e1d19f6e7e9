"""Log to TensorBoard as Composer does, in the run's own place and on rank 0 alone."""

from pathlib import Path
from typing import Any, NamedTuple

from composer.core import State
from composer.loggers import Logger, TensorboardLogger
from composer.utils import dist

__all__ = ["RunTensorboardLogger"]


class RunTensorboardLogger(TensorboardLogger):
    """Composer's TensorboardLogger, whose files are uploaded below the run's folder instead of the bucket's root.

    With ``rank_zero_only``, the other ranks write no files; Composer leaves an empty one of each.

    Args:
        log_dir: The folder of several runs' logs; this run's is in its subfolder ``run_name``.
        flush_interval: Batches between two files.
        rank_zero_only: Log on rank 0 alone.
        remote_folder: Key of the run's folder in the checkpoints' object store; ``None`` without a store.
    """

    def __init__(
        self,
        log_dir: str | None = None,
        flush_interval: int = 100,
        rank_zero_only: bool = True,
        remote_folder: str | None = None,
    ) -> None:
        super().__init__(log_dir, flush_interval, rank_zero_only)
        self.remote_folder = remote_folder

    def init(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0 or not self.rank_zero_only:
            super().init(state, logger)

    def _flush(self, logger: Logger) -> None:
        uploads: Any = logger if self.remote_folder is None else _UploadsBelow(self.remote_folder, logger)
        super()._flush(uploads)


class _UploadsBelow(NamedTuple):
    """The logger that Composer's TensorboardLogger uploads with, for one folder of the store."""

    folder: str
    logger: Logger

    def upload_file(self, remote_file_name: str, file_path: Path, *, overwrite: bool) -> None:
        self.logger.upload_file(f"{self.folder}/{remote_file_name}".lstrip("/"), file_path, overwrite=overwrite)
