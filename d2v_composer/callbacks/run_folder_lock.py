"""One run in a folder at a time."""

import os
import platform
import weakref
from pathlib import Path

from composer.core import Callback
from composer.utils import dist

from d2v_composer.system.errors import InputError
from d2v_composer.system.file_locks import acquire

__all__ = ["RunFolderLock"]

# How long the workers of a run that was killed may hold on to its lock.
LAST_RUN_LEAVES = 10.0
LONGEST_NOTE = 4096
# What a run writes beside its checkpoints.
FILES = (".in_use", "latest-rank0.pt", "log.jsonl", "report.html", "run.yaml")


class RunFolderLock(Callback):
    """Refuse to train in a folder where another run of this machine trains.

    Two would write into one log, and each resume from what the other saved.

    The folder is locked when the callback is made, before anything of it is read, and until the run is over.

    Args:
        folder: The run's, on this machine.
        remote: The address of a run in a store, of which ``folder`` holds copies, and may hold no other's; or ``None``.

    Raises:
        InputError: Another run has it, it is another run's, or there can be no such folder.
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
        """Lock the folder and note whose it is; what is wrong, where that cannot be."""
        for name in FILES:
            if (folder / name).is_dir():
                return f"save_folder: {folder / name}: is a folder, expected a run's file, or none"
        if (folder / "report").is_file():
            return f"save_folder: {folder / 'report'}: is a file, expected the folder of a run's report, or none"
        try:
            lock = acquire(self.path, wait=LAST_RUN_LEAVES)
        except OSError as error:
            return f"save_folder: {folder}: cannot be written ({error.strerror})"
        if lock is None:
            user = self.path.read_text(errors="replace").splitlines()[1:2]
            return (
                f"{folder}: another run trains there: give each a run_name or save_folder of its own"
                f"{''.join(f', or end {each}' for each in user)}"
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
        """Whether somebody removed the folder, or its lock, under the run; rank 0 alone can tell."""
        if self.lock is None:
            return False
        try:
            os.stat(self.path)
            return os.fstat(self.lock).st_nlink == 0  # another file may have its name
        except FileNotFoundError:
            return True
        except OSError:  # a file system that is away
            return False

    def post_close(self) -> None:
        if self.lock is not None:
            self.lock = None
            self.release()
