"""Lock a run's folder against other runs on this machine."""

import os
import platform
import weakref

from d2v_composer.system.addresses import MARK, RunFolder
from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import names_in
from d2v_composer.system.files import acquire, check_owned, missing_parts, release

# Workers of a killed run may hold its lock for a while.
LOCK_WAIT_SECONDS = 10.0


class FolderLock:
    """A lock that keeps other runs on this machine out of a run's folder.

    Args:
        folder: The run's folder. If the lock creates the folder and nothing else is written there, the folder is
            removed on release.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.path = folder.local / MARK
        check_owned(folder.local, names_in(folder.local), MARK, "save_folder")
        new_folders = missing_parts(self.path)
        try:
            content = self.path.read_text(errors="replace") if self.path.exists() else ""
            lock = acquire(self.path, wait=LOCK_WAIT_SECONDS)
        except OSError as error:
            raise InputError(f"save_folder: {folder.local} cannot be written ({error.strerror})") from error
        # A loss of power may have left a part, or zeros.
        other, user = content.splitlines() if content.count("\n") == 2 else ("", "that run")
        if lock is None:
            raise InputError(
                f"save_folder: {folder.local} is in use by another run: choose another save_folder, or stop {user}"
            )
        self.status, self.release = os.stat(self.path), weakref.finalize(self, release, lock, new_folders)
        if other not in ("", folder.address):
            self.path.write_text(content)  # the lock may have emptied it
            raise InputError(
                f"save_folder: {folder.local} holds the files of {other}, not of {folder.address or 'this run'}; "
                "choose another save_folder"
            )
        self.mark((folder.address or "") if new_folders else other)

    def mark(self, address: str) -> None:
        """Write the address of the run's folder in a store, or '', and this process's ID to the lock file."""
        self.path.write_text(f"{address}\nprocess {os.getpid()} on {platform.node()}\n")

    def is_removed(self) -> bool:
        """Return True if the lock file was removed or replaced."""
        try:
            return not os.path.samestat(os.stat(self.path), self.status)
        except FileNotFoundError:
            return True
        except OSError:  # a file system that is away for a moment must not end the run
            return False
