"""Complete Composer's CheckpointSaver: uploads that are retried, and old checkpoints removed, here and in the store."""

import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from composer.callbacks import CheckpointSaver
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from composer.utils.object_store import S3ObjectStore

from d2v_composer.callbacks.trainer_state import SavedCheckpoints
from d2v_composer.checkpoints.pointer import LATEST
from d2v_composer.checkpoints.resume import newest_first
from d2v_composer.system.multi_node import rank_zero_first
from d2v_composer.system.retry import CONNECT_SECONDS, reason

__all__ = ["PATIENT_CLIENT", "CheckpointRetention"]

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
