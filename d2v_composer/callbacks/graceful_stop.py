"""Save a checkpoint and exit on SIGTERM, which schedulers of clusters and spot instances send."""

import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback, Event, State
from composer.loggers import Logger, RemoteUploaderDownloader
from composer.utils import create_interval_scheduler, dist

from d2v_composer.callbacks.checkpoint_retention import CheckpointRetention
from d2v_composer.callbacks.jsonl_logger import JSONLLogger
from d2v_composer.callbacks.run_folder_lock import RunFolderLock
from d2v_composer.callbacks.trainer_state import find_callback
from d2v_composer.system.errors import InputError

__all__ = ["GracefulStop"]

EXIT_STATUS = 128 + signal.SIGTERM


class GracefulStop(Callback):
    """Finish the current batch on SIGTERM, save a checkpoint, and exit with status 143 (128 + SIGTERM).

    A run whose folder was removed also stops after its batch, with an error.

    Composer's launcher forwards the signal to its ranks, and kills the remaining ones after 30 seconds. The run's other
    processes may receive it as well: see :mod:`d2v_composer.system.worker_lifetime`.

    Pass :attr:`save_interval` to the Trainer as its ``save_interval``: the CheckpointSaver itself then writes the
    checkpoint, counts it and prunes it, and autoresume finds it.

    Args:
        save_interval: The regular interval of checkpoints, a Composer time string.
    """

    def __init__(self, save_interval: str) -> None:
        self.is_due = create_interval_scheduler(save_interval)
        self.signalled = False
        self.stopping = False
        self.run_folder_lock: RunFolderLock | None = None
        self.previous_handler = signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.signalled = True

    def init(self, state: State, logger: Logger) -> None:
        self.run_folder_lock = find_callback(state, RunFolderLock)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Agree with the other ranks on whether to stop: the signal may reach them at different batches.

        Raises:
            InputError: The run's folder was removed, so that nothing can be saved.
        """
        flags = [self.signalled, self.run_folder_lock is not None and self.run_folder_lock.is_removed()]
        if dist.get_world_size() > 1:
            tensor = state.device.tensor_to_device(torch.tensor(flags, dtype=torch.uint8))
            dist.all_reduce(tensor, reduce_operation="MAX")
            flags = [bool(flag) for flag in tensor.tolist()]
        self.stopping, is_removed = flags
        if is_removed and self.run_folder_lock is not None:
            raise InputError(
                f"save_folder: {self.run_folder_lock.folder} or its lock .in_use was removed during the run: "
                f"stopped after batch {int(state.timestamp.batch) - 1}; progress not saved elsewhere is lost"
            )

    @property
    def save_interval(self) -> Callable[[State, Event], bool]:
        """The schedule of checkpoints: at the interval, and once more when stopping."""

        def is_due(state: State, event: Event) -> bool:
            return self.is_due(state, event) or self.stopping

        return is_due

    def batch_start(self, state: State, logger: Logger) -> None:
        self._exit_if_stopping(state, logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        self._exit_if_stopping(state, logger)

    def close(self, state: State, logger: Logger) -> None:
        if not self.stopping:  # otherwise the process is about to exit with its own status
            signal.signal(signal.SIGTERM, self.previous_handler)

    def _exit_if_stopping(self, state: State, logger: Logger) -> None:
        """Exit once the checkpoint, which is written last in its batch, is uploaded."""
        if not self.stopping:
            return
        for callback in state.callbacks:
            if isinstance(callback, CheckpointRetention | CheckpointSaver | JSONLLogger | RemoteUploaderDownloader):
                callback.fit_end(state, logger)
        dist.barrier()  # once one rank exits, the launcher soon kills the others
        if dist.get_global_rank() == 0:
            with suppress(OSError):  # a killed launcher may have closed the terminal
                print(f"SIGTERM: stopped at batch {int(state.timestamp.batch)}, its checkpoint is saved", flush=True)
        raise SystemExit(EXIT_STATUS)
