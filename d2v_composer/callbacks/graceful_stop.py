"""Save a checkpoint and exit on SIGTERM, which schedulers and spot instances send, and on Ctrl-C (SIGINT)."""

import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from enum import Enum, auto
from functools import partial
from types import FrameType
from typing import Any

import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback, Event, State
from composer.loggers import Logger, RemoteUploaderDownloader
from composer.utils import create_interval_scheduler, dist
from tqdm import tqdm

from d2v_composer.callbacks.checkpoint_retention import CheckpointRetention
from d2v_composer.callbacks.jsonl_logger import JSONLLogger
from d2v_composer.callbacks.run_folder_lock import RunFolderLock
from d2v_composer.callbacks.trainer_state import find_callback
from d2v_composer.callbacks.zero_shot_retrieval import ZeroShotRetrieval
from d2v_composer.system import interrupts
from d2v_composer.system.errors import InputError

__all__ = ["GracefulStop"]

# A stop that takes longer says that it is on its way.
NOTICE_SECONDS = 1.0
NOTICE = "Interrupted: saving after this batch; a second Ctrl-C ends the run at once, without saving"
LAST_NOTICE = "Interrupted: finishing; a second Ctrl-C ends the run at once"


class _CutShort(BaseException):
    """Leaves a measurement that a signal came in."""


class Phase(Enum):
    """The work that a signal waits for."""

    STARTING = auto()
    """Nothing: no batch has been trained."""
    BATCH = auto()
    """The end of the batch and its checkpoint."""
    RETRIEVAL = auto()
    """The checkpoint of a batch; a retrieval before it can be left out."""
    MEASURING = auto()
    """The same; the retrieval that is under way is cut short."""


class GracefulStop(Callback):
    """Finish the current batch on SIGTERM or SIGINT, save a checkpoint, and exit with status 143 or 130 (128 + signal).

    A retrieval that is due in this batch is left out or, on one rank, cut short; the resumed run measures it first.
    The last batch of a run is the exception: its retrieval is finished. Before the first batch has ended there is
    nothing to save, and a signal ends the run at once; so does a second SIGINT at any time.

    A run whose folder was removed also stops after its batch, with an error.

    Composer's launcher forwards SIGTERM to its ranks, sends it after SIGINT, and kills the remaining ranks after 30
    seconds. The run's other processes may receive the signals as well: see :mod:`d2v_composer.system.worker_lifetime`.

    Pass :attr:`save_interval` to the Trainer as its ``save_interval``: the CheckpointSaver itself then writes the
    checkpoint, counts it and prunes it, and autoresume finds it. Pass the callback before ZeroShotRetrieval. Call
    :meth:`end_training` after the Trainer's ``fit``.

    Args:
        save_interval: The regular interval of checkpoints, a Composer time string.
        advice: The end of the line that says at which batch the run stopped.
    """

    def __init__(self, save_interval: str, advice: str = "") -> None:
        self.is_due = create_interval_scheduler(save_interval)
        self.advice = advice
        self.phase = Phase.STARTING
        self.notice = NOTICE
        self.received: set[signal.Signals] = set()
        self.stopped_by: signal.Signals | None = None  # the same on all ranks
        self.retrieval_is_missing = False
        self.run_folder_lock: RunFolderLock | None = None
        self.retrieval: ZeroShotRetrieval | None = None
        handled = [signal.SIGTERM] if interrupts.is_ignored() else [signal.SIGINT, signal.SIGTERM]
        self.previous: dict[int, Any] = {signum: signal.signal(signum, self._on_signal) for signum in handled}

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.phase is Phase.STARTING:
            self.previous[signum](signum, frame)
        if signum == signal.SIGINT:
            interrupts.second_ends_at_once()
            show_later(lambda: self.notice)
        self.received.add(signal.Signals(signum))
        if self.phase is Phase.MEASURING:
            self.phase = Phase.RETRIEVAL
            raise _CutShort

    def init(self, state: State, logger: Logger) -> None:
        self.run_folder_lock = find_callback(state, RunFolderLock)
        self.retrieval = find_callback(state, ZeroShotRetrieval)
        if self.retrieval is not None:
            self.retrieval.evaluate = partial(self.evaluate, self.retrieval.evaluate)
            self.retrieval.measure_set = partial(self.measure_set, self.retrieval.measure_set)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Measure what the run before could not, when it was stopped."""
        if self.retrieval_is_missing and self.retrieval is not None:
            self.retrieval.evaluate(state, logger)
        self.retrieval_is_missing = False

    def state_dict(self) -> dict[str, Any]:
        return {"retrieval_is_missing": self.retrieval_is_missing}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.retrieval_is_missing = state.get("retrieval_is_missing", False)  # earlier versions left out none

    def batch_end(self, state: State, logger: Logger) -> None:
        """Agree with the other ranks on whether to stop: a signal may reach them at different batches.

        Raises:
            InputError: The run's folder was removed, so that nothing can be saved.
        """
        is_removed = self._agree(state, self.run_folder_lock is not None and self.run_folder_lock.is_removed())
        is_last = state.max_duration is not None and state.timestamp >= state.max_duration
        # A finished run measures nothing when it starts again.
        self.phase, self.notice = (Phase.BATCH, LAST_NOTICE) if is_last else (Phase.RETRIEVAL, NOTICE)
        if is_removed and self.run_folder_lock is not None:
            raise InputError(
                f"save_folder: {self.run_folder_lock.folder} or its lock .in_use was removed during the run: "
                f"stopped after batch {int(state.timestamp.batch) - 1}; progress not saved elsewhere is lost"
            )

    def evaluate(self, evaluate: Callable[[State, Logger], None], state: State, logger: Logger) -> None:
        """Evaluate, unless the run is to stop in this batch; what was measured is recorded in any case."""
        try:
            if self.phase is Phase.RETRIEVAL and self.stopped_by is not None:
                raise _CutShort
            evaluate(state, logger)
        except _CutShort:
            self._agree(state)
            self.retrieval_is_missing = True

    def measure_set(self, measure_set: Callable[..., Any], dataset: str, embeds: Any, state: State) -> dict[Any, Any]:
        """Measure one set, until a signal comes."""
        if self.phase is not Phase.RETRIEVAL or dist.get_world_size() > 1:  # others would wait in a collective
            return measure_set(dataset, embeds, state)
        self.phase = Phase.MEASURING
        try:
            if self.received:  # between two sets
                raise _CutShort
            return measure_set(dataset, embeds, state)
        finally:
            self.phase = Phase.RETRIEVAL

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self.phase = Phase.BATCH

    @property
    def save_interval(self) -> Callable[[State, Event], bool]:
        """The schedule of checkpoints: at the interval, and once more when stopping."""

        def is_due(state: State, event: Event) -> bool:
            return self.is_due(state, event) or self.stopped_by is not None

        return is_due

    def batch_start(self, state: State, logger: Logger) -> None:
        self._exit_if_stopping(state, logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        self._exit_if_stopping(state, logger)

    def end_training(self, state: State, logger: Logger) -> None:
        """Exit if a signal came since the last batch; all is saved, and from now on a signal ends the process at once.

        Call it on every rank.
        """
        self._agree(state)  # a rank that left before the others have agreed would fail them
        self._exit_if_stopping(state, logger)
        self._restore()
        for signum in sorted(self.received):  # since then
            self.previous[signum](signum, None)

    def close(self, state: State, logger: Logger) -> None:
        if self.stopped_by is None:  # otherwise the process is about to exit with its own status
            self._restore()

    def _restore(self) -> None:
        for signum, previous in self.previous.items():
            if signal.getsignal(signum) == self._on_signal:
                signal.signal(signum, previous)

    def _agree(self, state: State, flag: bool = False) -> bool:
        """Set ``stopped_by`` to the signal that reached any rank; return whether the flag is set on any."""
        flags = [flag, *(signum in self.received for signum in interrupts.NAMES)]
        if dist.get_world_size() > 1:
            tensor = state.device.tensor_to_device(torch.tensor(flags, dtype=torch.uint8))
            dist.all_reduce(tensor, reduce_operation="MAX")
            flags = [bool(each) for each in tensor.tolist()]
        flag, *came = flags
        agreed = [signum for signum, has_come in zip(interrupts.NAMES, came, strict=True) if has_come]
        self.stopped_by = agreed[0] if agreed else None
        return flag

    def _exit_if_stopping(self, state: State, logger: Logger) -> None:
        """Exit once the checkpoint, which is written last in its batch, is uploaded."""
        if self.stopped_by is None:
            return
        for callback in state.callbacks:
            if isinstance(callback, CheckpointRetention | CheckpointSaver | JSONLLogger | RemoteUploaderDownloader):
                callback.fit_end(state, logger)
        dist.barrier()  # once one rank exits, the launcher soon kills the others
        is_saved = find_callback(state, CheckpointSaver) is not None
        said = f"{'saved' if is_saved else 'stopped'} at batch {int(state.timestamp.batch)}{self.advice}"
        show(f"{interrupts.NAMES[self.stopped_by]}: {said}")
        raise SystemExit(interrupts.status(self.stopped_by))


def show(line: str) -> None:
    """Print a line on rank 0, above a progress bar."""
    if dist.get_global_rank() == 0:
        with suppress(OSError):  # a killed launcher may have closed the terminal
            tqdm.write(line)
            sys.stdout.flush()


def show_later(line: Callable[[], str]) -> None:
    """Print what is then the line, if the process still runs after a while."""
    timer = threading.Timer(NOTICE_SECONDS, lambda: show(line()))
    timer.daemon = True
    timer.start()
