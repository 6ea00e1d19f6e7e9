"""Lock a run's folder, so that one run at a time uses it."""

import os
import platform
import weakref
from pathlib import Path

from composer.core import Callback
from composer.utils import dist

from d2v_composer.checkpoints.pointer import LATEST
from d2v_composer.system.errors import InputError
from d2v_composer.system.file_locks import acquire

__all__ = ["RunFolderLock"]

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
