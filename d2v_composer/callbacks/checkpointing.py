"""Save a run's checkpoints, and stop a run on a signal or when the loss is not finite."""

import logging
import math
import signal
import sys
from contextlib import suppress
from pathlib import Path

import torch
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist
from tqdm import tqdm

from d2v_composer.callbacks.alignment import AlignStudent
from d2v_composer.callbacks.logging import Uploads
from d2v_composer.callbacks.trainer_state import find_callback, has_ended, loss_scale
from d2v_composer.checkpoints.checkpoint import LATEST, LOG
from d2v_composer.checkpoints.saving import (
    ADVICE,
    prune,
    prune_store,
    publish,
    upload_checkpoint,
    upload_missing,
    write_state,
)
from d2v_composer.system import processes
from d2v_composer.system.addresses import MARK, RunFolder
from d2v_composer.system.errors import RunError, writing
from d2v_composer.system.fetch import put
from d2v_composer.system.folder_lock import FolderLock
from d2v_composer.system.ranks import rank_zero_first

NOTICE = "Interrupted: stopping after this batch; a second Ctrl-C stops the run immediately, without saving"
# What the ranks agree on: the greatest wins.
STOPS = (None, signal.SIGTERM, signal.SIGINT)
REMOVED = len(STOPS)

log = logging.getLogger(__name__)


class Stop:
    """The signal that ends a run after the current batch.

    Attributes:
        signal: The signal, the same on all ranks; ``None`` while the run goes on.
        is_last_batch: True after the last batch of a run whose duration is in batches.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.is_last_batch = False

    def has_come(self) -> bool:
        """Return True if a signal has come; the result is the same on all ranks."""
        if self.signal is None and dist.get_world_size() == 1:
            self.signal = processes.received()
        return self.signal is not None

    def ends_retrieval(self) -> bool:
        """Return True if a retrieval evaluation must be skipped or ended; the result is the same on all ranks."""
        return self.has_come() and not self.is_last_batch


class Checkpoints(Callback):
    """Save and upload checkpoints, remove old checkpoints, and stop on a signal.

    On SIGTERM or SIGINT, the run finishes its batch, saves a checkpoint, and exits with status 143 or 130. A later
    SIGINT, or a signal before the first batch has ended, ends the run at once, without saving.

    Pass no ``save_folder`` to the Trainer, and pass this callback after NanGuard and before ZeroShotRetrieval. Call
    :meth:`begin` before the Trainer's ``fit``, and :meth:`end_training` after ``fit``.

    Args:
        folder: The run's folder, which is locked against other runs; ``None``: nothing is saved.
        save_interval: Time between checkpoints, a Composer time string in batches, such as ``500ba``.
        num_to_keep: Number of newest checkpoints to keep, on this machine and in S3; -1 keeps all.
        uploads: The logger that uploads the run's files; ``None`` if the folder is in no store.
        advice: Text that follows the folder's name in the line that is printed after a signal.
        stop: The signal, updated at the end of each batch. Pass ``stop.ends_retrieval`` to ZeroShotRetrieval as
            ``should_stop``.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        save_interval: str,
        num_to_keep: int = -1,
        uploads: Uploads | None = None,
        advice: str = "",
        stop: Stop | None = None,
    ) -> None:
        self.folder, self.num_to_keep, self.uploads, self.advice = folder, num_to_keep, uploads, advice
        self.is_due = create_interval_scheduler(save_interval)
        self.stop = stop or Stop()
        self.last_saved = -1
        self.lock: FolderLock | None = None
        with rank_zero_first("save_folder"):
            if folder is not None and dist.get_global_rank() == 0:
                self.lock = FolderLock(folder)

    def batch_end(self, state: State, logger: Logger) -> None:
        processes.defer_signals(NOTICE)
        # A finished run measures nothing when it starts again.
        self.stop.is_last_batch = has_ended(state)
        self._agree(state)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self.is_due(state, Event.BATCH_CHECKPOINT) or self.stop.has_come():
            self._save(state)
        if not self.stop.is_last_batch:
            self._exit_if_stopping(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Save at the end of a run whose duration is in epochs."""
        if has_ended(state) and not self.stop.is_last_batch:
            self.last_saved = -1  # the last batch's checkpoint was saved before the epoch ended
            self._save(state)

    def _save(self, state: State) -> None:
        batch = int(state.timestamp.batch)
        if self.folder is None or batch == self.last_saved:
            return
        self.last_saved = batch
        if (align := find_callback(state, AlignStudent)) is not None:
            align.fit_at_end(state)
        path = self.folder.local / f"ep{int(state.timestamp.epoch)}-ba{batch}-rank0.pt"
        write_state(state, path, publish)
        with writing(self.folder.local):
            if dist.get_global_rank() == 0:
                if self.uploads is None:
                    prune(self.folder.local, self.num_to_keep)
                else:
                    self.uploads.start(self._upload, self.uploads, path)

    def _upload(self, uploads: Uploads, checkpoint: Path) -> None:
        if checkpoint.exists():  # else it was outdated when the one before it was uploaded
            uploads.upload(checkpoint.with_name(LOG))  # first: another machine goes on from both
            upload_checkpoint(checkpoint, uploads.address)
            with writing(checkpoint.parent):
                prune(checkpoint.parent, self.num_to_keep)
            prune_store(uploads.address, checkpoint.name, self.num_to_keep)

    def _agree(self, state: State) -> None:
        """Set ``stop.signal`` on all ranks if a signal has reached any rank."""
        is_removed = self.lock is not None and self.lock.is_removed()
        code = REMOVED if is_removed else STOPS.index(processes.received())
        if dist.get_world_size() > 1:
            tensor = state.device.tensor_to_device(torch.tensor(code))
            dist.all_reduce(tensor, reduce_operation="MAX")
            code = int(tensor)
        if code == REMOVED and self.folder is not None:
            raise RunError(
                f"save_folder: {self.folder.local} or its lock {MARK} was removed during the run: "
                f"stopped after batch {int(state.timestamp.batch)}; progress not saved elsewhere is lost"
            )
        self.stop.signal = STOPS[code]

    def begin(self) -> None:
        """Mark the folder, and its copy in a store, as the run's; call this method after all checks of the run.

        Without a checkpoint in the folder, the log is deleted. If the store lacks the folder's newest checkpoint, the
        newest checkpoint is uploaded.
        """
        with rank_zero_first("save_folder"):
            if self.folder is not None and self.lock is not None:
                self.lock.mark(self.folder.address or "")
                if not (self.folder.local / LATEST).exists():  # the run was killed before its first checkpoint
                    (self.folder.local / LOG).unlink(missing_ok=True)
                if self.folder.address is not None:
                    put(self.lock.path, f"{self.folder.address}/{MARK}")
                    upload_missing(self.folder)

    def end_training(self, state: State) -> None:
        """Exit if a signal has arrived; call this method on every rank."""
        self._agree(state)  # a rank that left before the others have agreed would fail them
        self._exit_if_stopping(state)
        processes.obey_signals()  # all is saved

    def _exit_if_stopping(self, state: State) -> None:
        if (signum := self.stop.signal) is None:
            return
        with rank_zero_first("the upload of the checkpoint"):  # minutes, which no collective would wait
            if self.uploads is not None:
                self.uploads.wait()
        dist.barrier()  # once one rank exits, the launcher soon kills the others
        if dist.get_global_rank() == 0:
            batch, folder = int(state.timestamp.batch), self.folder
            outcome = f"saved at batch {batch} in {folder}{self.advice}" if folder else "not saved"
            with suppress(OSError):  # a killed launcher may have closed the terminal
                tqdm.write(f"{processes.SIGNAL_NAMES[signum]}: {outcome}")
                sys.stdout.flush()
        raise SystemExit(128 + signum)

    def close(self, state: State, logger: Logger) -> None:
        processes.forget_signals()
        uploads, self.uploads = self.uploads, None  # Composer closes again at exit, when no thread can start
        if self.folder is not None and uploads is not None and dist.get_global_rank() == 0:
            uploads.start(uploads.upload, self.folder.local / LOG)

    def post_close(self) -> None:
        if self.lock is not None:
            self.lock.release()


# fairseq's --min-loss-scale: below it every step is skipped.
MIN_LOSS_SCALE = 1e-4


class NanGuard(Callback):
    """Stop training, with a FloatingPointError, when the loss is infinite or NaN.

    With loss scaling (amp_fp16), training stops instead when the loss scale is below :data:`MIN_LOSS_SCALE`.

    Example:
        >>> from d2v_composer.callbacks import NanGuard
        >>> guard = NanGuard()  # Trainer(callbacks=[guard]): before callbacks that save
    """

    def batch_end(self, state: State, logger: Logger) -> None:
        batch, scale = int(state.timestamp.batch), loss_scale(state)
        loss = (state.total_loss_dict or {}).get("loss/train/total", 0.0)
        # On a GPU the Trainer has an enabled scaler in any precision; this is set when a loss is first scaled.
        is_scaled = scale > 0 and getattr(state.scaler, "_scale", None) is not None
        if not math.isfinite(loss) and not is_scaled:
            raise FloatingPointError(f"batch {batch}: the training loss is {loss}; {ADVICE}")
        if 0 < scale < MIN_LOSS_SCALE:
            raise FloatingPointError(
                f"batch {batch}: the loss scale fell to {scale:g} because the gradients are not finite; {ADVICE}"
            )
