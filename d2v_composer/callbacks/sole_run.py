"""One run in a folder at a time."""

import os
from pathlib import Path

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from d2v_composer.errors import InputError
from d2v_composer.locks import acquire

__all__ = ["SoleRun"]

# How long the workers of a run that was killed may hold on to its lock.
LAST_RUN_LEAVES = 10.0


class SoleRun(Callback):
    """Refuse to train in a folder where another run of this machine trains.

    Two would write into one log, and each resume from what the other saved.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock: int | None = None

    def init(self, state: State, logger: Logger) -> None:
        """Lock the folder, on all ranks' behalf.

        Raises:
            InputError: Another run has it.
        """
        is_ours = [True]
        if dist.get_global_rank() == 0:
            self.lock = acquire(self.folder / ".in_use", wait=LAST_RUN_LEAVES)
            is_ours = [self.lock is not None]
        dist.broadcast_object_list(is_ours)
        if not is_ours[0]:
            raise InputError(f"{self.folder}: another run trains there: give each a run_name or save_folder of its own")

    def post_close(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None
