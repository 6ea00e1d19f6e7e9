"""Checkpoints of a run: save when a signal stops it, none with numbers that are not finite, as many as are asked for.

The run's folder is locked, so that one run at a time uses it.
"""

import logging
import math
import os
import platform
import signal
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback, Event, State
from composer.loggers import Logger, RemoteUploaderDownloader
from composer.utils import create_interval_scheduler, dist
from composer.utils.object_store import S3ObjectStore
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from d2v_composer.callbacks.logging import JSONLLogger
from d2v_composer.callbacks.trainer_state import SavedCheckpoints, find_callback, loss_scale, unwrapped
from d2v_composer.callbacks.zero_shot_retrieval import ZeroShotRetrieval
from d2v_composer.checkpoints.resume import newest_first
from d2v_composer.checkpoints.safe_load import LATEST
from d2v_composer.system import processes
from d2v_composer.system.errors import InputError
from d2v_composer.system.files import acquire
from d2v_composer.system.ranks import gather_objects, rank_zero_first
from d2v_composer.system.retry import CONNECT_SECONDS, reason

# botocore's legacy mode pauses for up to 2^(n-1) s before attempt n, so that uploads are retried for some ten minutes.
# The other modes have a quota of retries, which the parts of one large file use up within a second.
PATIENT_CLIENT = {"retries": {"mode": "legacy", "max_attempts": 11}, "connect_timeout": CONNECT_SECONDS}
# Training waits for pruning, and the next checkpoint repeats it.
IMPATIENT_CLIENT = {
    "retries": {"mode": "standard", "max_attempts": 1},
    "connect_timeout": CONNECT_SECONDS,
    "read_timeout": 20,
}
# Composer polls until a checkpoint is uploaded, then uploads the pointer to it. Its own interval is 30 s, after which
# its launcher kills the ranks.
POINTER_SECONDS = 2.0

log = logging.getLogger(__name__)


class CheckpointRetention(Callback):
    """Keep the newest checkpoints, on this machine and in S3, and retry uploads for as long as a store is unreachable.

    Composer counts only the checkpoints of its own process, removes none from a store, stops retrying after seconds,
    and leaves uploaded files in a temporary folder. This callback never removes the checkpoint that the pointer
    ``latest-rank0.pt`` names, nor a newer one: an old checkpoint is removed only once a newer one is complete.

    Pass ``save_num_checkpoints_to_keep=-1`` to the Trainer.

    Args:
        folder: The folder of the checkpoints on this machine.
        remote_folder: Their prefix in the object store, or ``None``.
        num_to_keep: The number to keep on this machine, and in the store; -1 keeps all.
    """

    def __init__(self, folder: Path, remote_folder: str | None, num_to_keep: int) -> None:
        self.folder = folder
        self.remote_folder = remote_folder
        self.num_to_keep = num_to_keep
        self.saver: CheckpointSaver | None = None

    def init(self, state: State, logger: Logger) -> None:
        self.saved = SavedCheckpoints(state)
        self.saver = self.saved.saver
        if self.saver is None or self.saver.remote_uploader is None:
            return
        use_folder(self.saver, self.folder)
        self.saver._symlink_upload_wait_before_next_try_in_seconds = POINTER_SECONDS
        uploader = self.saver.remote_uploader
        if uploader.remote_backend_name == "s3":
            uploader.backend_kwargs["client_config"] = PATIENT_CLIENT
        elif self.num_to_keep > 0:
            log.warning("%s: old checkpoints are removed only from S3; this store keeps all", self.saver.folder)

    def batch_start(self, state: State, logger: Logger) -> None:
        if self.saver is not None and self.saved.has_new():
            self._prune(self.saver)
            remove_pointers(self.saver)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Wait for the uploads before Composer's callback does: there the other ranks would wait in a collective."""
        if self.saver is not None and self.saver.remote_uploader is not None:
            with rank_zero_first("the upload of the checkpoint"):
                self.saver.fit_end(state, logger)
            self.saver.symlink_upload_tasks.clear()

    def close(self, state: State, logger: Logger) -> None:
        if self.saver is not None and self.saver.saved_checkpoints:  # the last ones are uploaded by now
            self._prune(self.saver)

    def _prune(self, saver: CheckpointSaver) -> None:
        if self.num_to_keep < 0 or dist.get_global_rank() != 0:
            return
        prune_folder(self.folder, self.num_to_keep)
        if saver.remote_uploader is not None and saver.remote_uploader.remote_backend_name == "s3":
            self.prune_remote(saver.remote_uploader.remote_bucket_name)

    def prune_remote(self, bucket: str) -> None:
        """Remove the outdated checkpoints in the store; a failure must not stop the run."""
        assert self.remote_folder is not None  # a run with a bucket has a prefix
        try:
            prune_store(bucket, self.remote_folder, self.num_to_keep)
        except Exception as error:  # noqa: BLE001
            log.warning("%s: could not remove its old checkpoints (%s)", self.remote_folder, reason(error))


def use_folder(saver: CheckpointSaver, folder: Path) -> None:
    """Write checkpoints for a store into the run's own folder first, where a restart finds them.

    Composer writes them into a temporary folder, which it never removes; at this point it is still empty.
    """
    temporary = Path(saver.folder)
    for _ in folder.parts:
        temporary = temporary.parent
    with suppress(OSError):
        temporary.rmdir()
    saver.folder = saver.filename.folder = str(folder)
    if saver.latest_filename is not None:
        saver.latest_filename.folder = str(folder)


def remove_pointers(saver: CheckpointSaver) -> None:
    """Remove the temporary file that Composer creates for the pointer to each checkpoint and never removes."""
    waiting = {Path(file) for _, file, _ in saver.symlink_upload_tasks}
    for file in Path(saver.tmp_dir_for_symlink.name).iterdir():
        if file not in waiting:
            file.unlink()


def prune_folder(folder: Path, num_to_keep: int) -> None:
    """Remove the outdated checkpoints of a folder."""
    pointer = folder / LATEST
    if not pointer.is_symlink() or not pointer.exists():
        return
    with pointer.open("rb") as newest:
        os.fsync(newest.fileno())  # in case the machine fails
    for name in outdated((path.name for path in folder.iterdir()), pointer.readlink().name, num_to_keep):
        (folder / name).unlink(missing_ok=True)


def prune_store(bucket: str, folder: str, num_to_keep: int) -> None:
    """Remove the outdated checkpoints below a prefix in S3; raises what the client raises."""
    store = S3ObjectStore(bucket, client_config=dict(IMPATIENT_CLIENT))
    prefix = f"{folder}/" if folder else ""  # a bucket's root
    names = [key.removeprefix(prefix) for key in store.list_objects(prefix)]
    if f"{LATEST}.symlink" not in names:
        return
    pointer = store.client.get_object(Bucket=bucket, Key=f"{prefix}{LATEST}.symlink")["Body"].read().decode()
    for name in outdated(names, Path(pointer.strip()).name, num_to_keep):
        store.client.delete_object(Bucket=bucket, Key=f"{prefix}{name}")


def outdated(names: Iterable[str], pointed_at: str, num_to_keep: int) -> list[str]:
    """Return the names of the checkpoints to remove; none if the one that the pointer names is missing."""
    checkpoints = newest_first(names, pointed_at)
    return checkpoints[num_to_keep:] if pointed_at in checkpoints else []


# Workers of a killed run may hold its lock for a while.
LOCK_WAIT_SECONDS = 10.0
LONGEST_NOTE = 4096
# Files that a run writes beside its checkpoints.
FILES = (".in_use", LATEST, "log.jsonl", "report.html", "run.yaml")


class RunFolderLock(Callback):
    """Refuse to train in a folder that another run on this machine uses.

    Two runs would write into one log, and each would resume from the other's checkpoints. The folder is locked when the
    callback is created, before anything is read from it, until the end of the run.

    Args:
        folder: The run's folder on this machine.
        remote: The address of the run in a store, if ``folder`` holds copies of its files; it must not hold another's.

    Raises:
        InputError: Another run uses the folder, it holds another run's files, or it cannot be written.
    """

    def __init__(self, folder: Path, remote: str | None = None) -> None:
        self.folder, self.path = folder, folder / ".in_use"
        self.lock: int | None = None
        problem: list[str | None] = [None]
        if dist.get_global_rank() == 0:
            problem = [self._lock(folder, remote)]
        dist.broadcast_object_list(problem)
        if problem[0] is not None:
            raise InputError(problem[0])

    def _lock(self, folder: Path, remote: str | None) -> str | None:
        """Lock the folder and write its owner into the lock; return the problem, if any."""
        for name in FILES:
            if (folder / name).is_dir():
                return f"save_folder: {folder / name}: is a folder, expected a run's file, or none"
        if (folder / "report").is_file():
            return f"save_folder: {folder / 'report'}: is a file, expected the folder of a run's report, or none"
        try:
            lock = acquire(self.path, wait=LOCK_WAIT_SECONDS)
        except OSError as error:
            return f"save_folder: {folder}: cannot be written ({error.strerror})"
        if lock is None:
            user = self.path.read_text(errors="replace").splitlines()[1:2]
            return (
                f"save_folder: {folder} is in use by another run: choose another run_name or save_folder"
                f"{''.join(f', or stop {each}' for each in user)}"
            )
        other = os.pread(lock, LONGEST_NOTE, 0).decode(errors="replace").partition("\n")[0]
        if other not in ("", remote):
            os.close(lock)
            return f"save_folder: {folder} holds the files of {other}, not those of {remote or 'this run'}"
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{remote or ''}\nprocess {os.getpid()} of {platform.node()}\n".encode(), 0)
        self.lock = lock
        self.release = weakref.finalize(self, os.close, lock)
        return None

    def is_removed(self) -> bool:
        """Tell whether the folder or its lock was removed during the run; always False on ranks other than 0."""
        if self.lock is None:
            return False
        try:
            os.stat(self.path)
            return os.fstat(self.lock).st_nlink == 0  # the path may name a new file
        except FileNotFoundError:
            return True
        except OSError:  # the file system is unreachable
            return False

    def post_close(self) -> None:
        if self.lock is not None:
            self.lock = None
            self.release()


# fairseq's --min-loss-scale: below it every step is skipped.
MIN_LOSS_SCALE = 1e-4
# The loss scaler halves 65536 to 64 in this many skipped batches.
MAX_SKIPPED_BATCHES = 10
ADVICE = "earlier checkpoints are kept: resume from them with a lower optimizer.lr or another precision"


class NanGuard(Callback):
    """Stop training before a checkpoint with numbers that are not finite.

    Composer's NaNMonitor waits for the device; this callback reads the loss that is logged anyway, once a batch.
    Weights and the optimizer's moments are checked before each checkpoint.

    With a loss scaler (amp_fp16) a batch whose loss is not finite is skipped, and the scale halved. Ten such batches in
    a row stop the run.

    Args:
        save_interval: The schedule of checkpoints, as passed to the Trainer.
    """

    def __init__(self, save_interval: Callable[[State, Event], bool]) -> None:
        self.save_interval = save_interval
        self.num_skipped = 0
        self.names: dict[Tensor, str] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        # Later the model may hold gathered copies of sharded weights, which the optimizer does not know.
        self.names |= {weight: name for name, weight in unwrapped(state).named_parameters() if weight.requires_grad}

    def batch_end(self, state: State, logger: Logger) -> None:
        """Check the batch's loss, which is the same on all ranks, and the loss scale.

        Raises:
            FloatingPointError: The loss is not finite, or the loss scale too small.
        """
        batch = int(state.timestamp.batch) - 1
        loss = (state.total_loss_dict or {}).get("loss/train/total", 0.0)
        self.num_skipped = 0 if math.isfinite(loss) else self.num_skipped + 1
        if self.num_skipped > (MAX_SKIPPED_BATCHES - 1 if is_loss_scaled(state) else 0):
            in_a_row = f", {self.num_skipped} batches in a row" if self.num_skipped > 1 else ""
            raise FloatingPointError(f"batch {batch}: the training loss is {loss}{in_a_row}; {ADVICE}")
        scale = loss_scale(state)
        if 0 < scale < MIN_LOSS_SCALE:
            raise FloatingPointError(
                f"batch {batch}: the loss scale fell to {scale:g}: the gradients are not finite, and every step is "
                f"skipped; {ADVICE}"
            )

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self.save_interval(state, Event.BATCH_CHECKPOINT):
            check_weights(state, self.names)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        if self.save_interval(state, Event.EPOCH_CHECKPOINT):
            check_weights(state, self.names)


def is_loss_scaled(state: State) -> bool:
    """Tell whether the Trainer scales the loss; on a GPU it has an enabled scaler in any precision."""
    # Set when a loss is first scaled; GradScaler has no public way to tell.
    return loss_scale(state) > 0 and getattr(state.scaler, "_scale", None) is not None


def check_weights(state: State, names: Mapping[Tensor, str]) -> None:
    """Check the weights and the optimizer's moments, on all ranks.

    Args:
        state: Composer's state.
        names: The name of each of the optimizer's parameters.

    Raises:
        FloatingPointError: A weight or a moment of the optimizer is not finite.
    """
    found = first_not_finite(trained_tensors(state, names))
    if found := next((each for each in gather_objects(found) if each is not None), None):
        raise FloatingPointError(f"batch {int(state.timestamp.batch) - 1}: {found} is not finite; {ADVICE}")


def trained_tensors(state: State, names: Mapping[Tensor, str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the local parts of the optimizer's weights and moments, with their names."""
    for optimizer in state.optimizers:
        for weight in (each for group in optimizer.param_groups for each in group["params"]):
            name = names.get(weight, f"of shape {tuple(weight.shape)}")
            yield f"the weight {name}", local_part(weight.detach())
            for key, value in optimizer.state.get(weight, {}).items():
                if isinstance(value, Tensor):
                    yield f"the optimizer's {key} of {name}", local_part(value)


def first_not_finite(tensors: Iterator[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that is not finite; waits once for each device."""
    verdicts: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors:
        verdicts.setdefault(tensor.device, []).append((name, tensor.isfinite().all()))
    for on_device in verdicts.values():
        are_finite = torch.stack([verdict for _, verdict in on_device]).tolist()
        for (name, _), is_finite in zip(on_device, are_finite, strict=True):
            if not is_finite:
                return name
    return None


def local_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


NOTICE = "Interrupted: saving after this batch; a second Ctrl-C ends the run at once, without saving"
# What the ranks agree on: the greatest wins.
STOPS = (None, signal.SIGTERM, signal.SIGINT)
REMOVED = len(STOPS)


class GracefulStop(Callback):
    """Finish the current batch on SIGTERM or SIGINT, save a checkpoint, and exit with status 143 or 130 (128 + signal).

    A retrieval that is due in this batch is left out or, on one rank, cut short; the resumed run measures it first.
    The last batch of a run is the exception: its retrieval is finished. Before the first batch has ended there is
    nothing to save, and a signal ends the run at once; so does a second SIGINT at any time.

    A run whose folder was removed also stops after its batch, with an error.

    Composer's launcher forwards SIGTERM to its ranks, sends it after SIGINT, and kills the remaining ranks after 30
    seconds. :mod:`d2v_composer.system.processes` keeps signals from the run's other processes.

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
        self.stopped_by: signal.Signals | None = None  # the same on all ranks
        self.is_last_batch = False
        self.run_folder_lock: RunFolderLock | None = None

    def init(self, state: State, logger: Logger) -> None:
        self.run_folder_lock = find_callback(state, RunFolderLock)
        retrieval = find_callback(state, ZeroShotRetrieval)
        if retrieval is not None:
            retrieval.should_stop = self.should_stop

    def batch_end(self, state: State, logger: Logger) -> None:
        """Agree with the other ranks on whether to stop: a signal may reach them at different batches.

        Raises:
            InputError: The run's folder was removed, so that nothing can be saved.
        """
        processes.defer_signals(NOTICE)
        # A finished run measures nothing when it starts again.
        self.is_last_batch = state.max_duration is not None and state.timestamp >= state.max_duration
        if self._agree(state) == REMOVED and self.run_folder_lock is not None:
            raise InputError(
                f"save_folder: {self.run_folder_lock.folder} or its lock .in_use was removed during the run: "
                f"stopped after batch {int(state.timestamp.batch) - 1}; progress not saved elsewhere is lost"
            )

    def should_stop(self) -> bool:
        """Return True if a retrieval is to be left out or cut short, on all ranks."""
        return self._is_stopping() and not self.is_last_batch

    def _is_stopping(self) -> bool:
        if self.stopped_by is None and dist.get_world_size() == 1:  # several ranks agree only at the end of a batch
            self.stopped_by = processes.received()
        return self.stopped_by is not None

    @property
    def save_interval(self) -> Callable[[State, Event], bool]:
        """The schedule of checkpoints: at the interval, and once more when stopping."""

        def is_due(state: State, event: Event) -> bool:
            return self.is_due(state, event) or self._is_stopping()

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
        processes.obey_signals()

    def close(self, state: State, logger: Logger) -> None:
        processes.forget_signals()

    def _agree(self, state: State) -> int:
        """Set ``stopped_by`` to the signal that reached any rank; return the greatest code of all ranks."""
        is_removed = self.run_folder_lock is not None and self.run_folder_lock.is_removed()
        code = REMOVED if is_removed else STOPS.index(processes.received())
        if dist.get_world_size() > 1:
            tensor = state.device.tensor_to_device(torch.tensor(code))
            dist.all_reduce(tensor, reduce_operation="MAX")
            code = int(tensor)
        self.stopped_by = (*STOPS, None)[code]
        return code

    def _exit_if_stopping(self, state: State, logger: Logger) -> None:
        """Exit once the checkpoint, which is written last in its batch, is uploaded."""
        if self.stopped_by is None:
            return
        for callback in state.callbacks:
            if isinstance(callback, CheckpointRetention | CheckpointSaver | JSONLLogger | RemoteUploaderDownloader):
                callback.fit_end(state, logger)
        dist.barrier()  # once one rank exits, the launcher soon kills the others
        if dist.get_global_rank() == 0:
            is_saved = find_callback(state, CheckpointSaver) is not None
            said = f"{'saved' if is_saved else 'stopped'} at batch {int(state.timestamp.batch)}{self.advice}"
            with suppress(OSError):  # a killed launcher may have closed the terminal
                tqdm.write(f"{processes.NAMES[self.stopped_by]}: {said}")
                sys.stdout.flush()
        raise SystemExit(128 + self.stopped_by)
