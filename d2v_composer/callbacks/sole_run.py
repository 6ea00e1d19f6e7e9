"""One run in a folder at a time."""

import os
import weakref
from pathlib import Path

from composer.core import Callback
from composer.utils import dist

from d2v_composer.errors import InputError
from d2v_composer.locks import acquire

__all__ = ["SoleRun"]

# How long the workers of a run that was killed may hold on to its lock.
LAST_RUN_LEAVES = 10.0


class SoleRun(Callback):
    """Refuse to train in a folder where another run of this machine trains.

    Two would write into one log, and each resume from what the other saved.

    The folder is locked when the callback is made, before anything of it is read, and until the run is over.

    Args:
        folder: The run's.

    Raises:
        InputError: Another run has it.
    """

    def __init__(self, folder: Path) -> None:
        is_ours = [True]
        if dist.get_global_rank() == 0:
            lock = acquire(folder / ".in_use", wait=LAST_RUN_LEAVES)
            is_ours = [lock is not None]
            if lock is not None:
                self.release = weakref.finalize(self, os.close, lock)
        dist.broadcast_object_list(is_ours)
        if not is_ours[0]:
            raise InputError(f"{folder}: another run trains there: give each a run_name or save_folder of its own")

    def post_close(self) -> None:
        if dist.get_global_rank() == 0:
            self.release()
