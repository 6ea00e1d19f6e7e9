"""What Composer's CheckpointSaver leaves to do: patient uploads, and old checkpoints that go, here and in the store."""

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

from d2v_composer.checkpoints.resume import LATEST, newest_first
from d2v_composer.system.multi_node import rank_zero_first
from d2v_composer.system.retry import CONNECT_SECONDS, reason

__all__ = ["PATIENT_CLIENT", "CheckpointRetention"]

# Before attempt n botocore's legacy mode pauses for up to 2^(n-1) s: a store may be away for some ten minutes. The
# other modes have a quota of attempts, which the parts of one large file use up within a second.
PATIENT_CLIENT = {"retries": {"mode": "legacy", "max_attempts": 11}, "connect_timeout": CONNECT_SECONDS}
# Training waits for this one, and there is a next time.
IMPATIENT_CLIENT = {
    "retries": {"mode": "standard", "max_attempts": 1},
    "connect_timeout": CONNECT_SECONDS,
    "read_timeout": 20,
}
# How often Composer looks whether a checkpoint is in the store, before it writes there which one is the newest. Its own
# 30 s are as long as its launcher waits before it kills.
POINTER_SECONDS = 2.0

log = logging.getLogger(__name__)


class CheckpointRetention(Callback):
    """Keep the newest checkpoints, also of earlier processes and in S3, and wait for a store that is away.

    Composer counts those of its own process alone, removes none from a store, gives a store up after seconds, and
    leaves what goes there in a temporary folder. What the pointer ``latest-rank0.pt`` names is never removed here, nor
    what is newer: an old checkpoint goes only when the one that follows it is whole, on the disk or in the store.

    Give the Trainer ``save_num_checkpoints_to_keep=-1``.

    Args:
        folder: The checkpoints', on this machine.
        remote_folder: Their prefix in the object store, or ``None``.
        num_to_keep: How many, here and in the store each; -1: all.
    """

    def __init__(self, folder: Path, remote_folder: str | None, num_to_keep: int) -> None:
        self.folder = folder
        self.remote_folder = remote_folder
        self.num_to_keep = num_to_keep
        self.saver: CheckpointSaver | None = None
        self.num_saved = 0

    def init(self, state: State, logger: Logger) -> None:
        self.saver = next((each for each in state.callbacks if isinstance(each, CheckpointSaver)), None)
        if self.saver is None or self.saver.remote_uploader is None:
            return
        use_folder(self.saver, self.folder)
        self.saver._symlink_upload_wait_before_next_try_in_seconds = POINTER_SECONDS
        uploader = self.saver.remote_uploader
        if uploader.remote_backend_name == "s3":
            uploader.backend_kwargs["client_config"] = PATIENT_CLIENT
        elif self.num_to_keep > 0:
            log.warning("%s: old checkpoints are removed from S3 alone; all are kept here", self.saver.folder)

    def batch_start(self, state: State, logger: Logger) -> None:
        # The first event after that of a checkpoint, at which Composer's own callback is the last.
        if self.saver is not None and len(self.saver.saved_checkpoints) != self.num_saved:
            self.num_saved = len(self.saver.saved_checkpoints)
            self._prune(self.saver)
            remove_pointers(self.saver)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Wait for the uploads before Composer's callback does, on which the other ranks would wait in a collective."""
        if self.saver is not None and self.saver.remote_uploader is not None:
            with rank_zero_first("the upload of the checkpoint"):
                self.saver.fit_end(state, logger)
            self.saver.symlink_upload_tasks.clear()

    def close(self, state: State, logger: Logger) -> None:
        if self.saver is not None and self.saver.saved_checkpoints:  # the last ones, whose upload has ended by now
            self._prune(self.saver)

    def _prune(self, saver: CheckpointSaver) -> None:
        if self.num_to_keep < 0 or dist.get_global_rank() != 0:
            return
        prune_folder(self.folder, self.num_to_keep)
        if saver.remote_uploader is not None and saver.remote_uploader.remote_backend_name == "s3":
            self.prune_remote(saver.remote_uploader.remote_bucket_name)

    def prune_remote(self, bucket: str) -> None:
        """Remove the outdated checkpoints in the store; where that cannot be, a run must not end for it."""
        assert self.remote_folder is not None  # there is a bucket
        try:
            prune_store(bucket, self.remote_folder, self.num_to_keep)
        except Exception as error:  # noqa: BLE001
            log.warning("%s: its old checkpoints are not removed yet (%s)", self.remote_folder, reason(error))


def use_folder(saver: CheckpointSaver, folder: Path) -> None:
    """Make checkpoints that go to a store lie in the run's own folder before, where a restart finds them.

    Composer makes a temporary one for them, which it leaves behind; what it does with the path is done by no one yet.
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
    """Remove the files that Composer makes for a store's pointer, one a checkpoint, and never removes, store or not."""
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
        os.fsync(newest.fileno())  # a machine may fail as well
    for name in outdated((path.name for path in folder.iterdir()), pointer.readlink().name, num_to_keep):
        (folder / name).unlink(missing_ok=True)


def prune_store(bucket: str, folder: str, num_to_keep: int) -> None:
    """Remove the outdated checkpoints below a prefix in S3; an error is whatever the client raises."""
    store = S3ObjectStore(bucket, client_config=dict(IMPATIENT_CLIENT))
    prefix = f"{folder}/" if folder else ""  # a bucket's root
    names = [key.removeprefix(prefix) for key in store.list_objects(prefix)]
    if f"{LATEST}.symlink" not in names:
        return
    pointer = store.client.get_object(Bucket=bucket, Key=f"{prefix}{LATEST}.symlink")["Body"].read().decode()
    for name in outdated(names, Path(pointer.strip()).name, num_to_keep):
        store.client.delete_object(Bucket=bucket, Key=f"{prefix}{name}")


def outdated(names: Iterable[str], pointed_at: str, num_to_keep: int) -> list[str]:
    """The checkpoints among some files' names that may go; none, where the one that the pointer names is not there."""
    checkpoints = newest_first(names, pointed_at)
    return checkpoints[num_to_keep:] if pointed_at in checkpoints else []
