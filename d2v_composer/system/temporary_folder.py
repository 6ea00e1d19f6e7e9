"""Keep a run's temporary files in one folder, removed at its end or, after SIGKILL, at the next start."""

import getpass
import multiprocessing.util
import os
import shutil
import socket
import sys
import tempfile
import zlib
from pathlib import Path

from d2v_composer.system.errors import InputError
from d2v_composer.system.file_locks import acquire, sole_user

__all__ = ["machine_folder", "use_temporary_folder"]

# A lock of another machine's process may be invisible here, so that each machine removes only its own folders.
MACHINE = zlib.crc32(socket.gethostname().encode()) & 0xFFFF
PREFIX = f"d2v-{os.getuid()}-{MACHINE:04x}-"
LOCK = ".in_use"
# multiprocessing appends 33 characters for sockets, whose paths have at most 107; a DataLoader would hang.
LONGEST_PATH = 70
# For sockets only, if TMPDIR's path is longer; other temporary files may be too large for memory.
SHORT_FOLDERS = ("/tmp", "/dev/shm")
# After multiprocessing's own finalizers (-100).
LAST_OF_ALL = -200
TURN_SECONDS = 60.0


def machine_folder() -> Path:
    """Return the temporary folder that all of a user's runs on this machine share, if their TMPDIR is the same."""
    folder = Path(tempfile.gettempdir())
    return folder.parent if folder.name.startswith(PREFIX) else folder


def use_temporary_folder() -> None:
    """Point the temporary folder of this process and its children to a folder of the run.

    All ranks of a run on this machine share it; the last one removes it. Folders of killed runs, with checkpoints that
    were being uploaded, are removed now.

    Raises:
        InputError: TMPDIR's path is too long for a socket, and no shorter folder is writable.
    """
    shared = machine_folder()
    is_ours_already = Path(tempfile.gettempdir()) != shared  # in a child, or a second call
    folder = None if is_ours_already else _enter(shared)
    if folder is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(shared / f"torchinductor_{getpass.getuser()}"))  # kept
        if (remote_modules := sys.modules.get("torch.distributed.nn.jit.instantiator")) is not None:
            remote_modules._TEMP_DIR.cleanup()  # torch creates it at import for a feature unused here
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    if len(tempfile.gettempdir()) > LONGEST_PATH:
        _use_short_folder_for_sockets()


def _enter(shared: Path) -> Path | None:
    """Create the folder of this run's ranks and lock it until this process ends; ``None`` after a timeout."""
    folder = shared / f"{PREFIX}{os.environ.get('MASTER_PORT', f'p{os.getpid()}')}-{os.environ.get('NODE_RANK', '0')}"
    with sole_user(_turn(shared), TURN_SECONDS) as is_our_turn:
        if not is_our_turn:
            return None
        _sweep(shared)
        lock = acquire(folder / LOCK, wait=TURN_SECONDS, shared=True)
    if lock is None:
        return None
    multiprocessing.util.Finalize(None, _leave, (folder, lock), exitpriority=LAST_OF_ALL)
    return folder


def _turn(shared: Path) -> Path:
    """Return the lock for creating and removing folders; it is never removed."""
    return shared / f"{PREFIX}scratch.lock"


def _use_short_folder_for_sockets() -> None:
    long_path = tempfile.gettempdir()
    for shared in filter(_is_writable, map(Path, SHORT_FOLDERS)):
        if (folder := _enter(shared)) is not None:
            tempfile.tempdir = str(folder)
            multiprocessing.util.get_temp_dir()  # created now, and used from now on
            tempfile.tempdir = long_path
            return
    raise InputError(
        f"TMPDIR: must have at most {LONGEST_PATH} characters if none of {', '.join(SHORT_FOLDERS)} is writable, got "
        f"{len(long_path)}: {long_path}"
    )


def _is_writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _sweep(shared: Path) -> None:
    """Remove this machine's unused folders; without locks none, since a run may use it."""
    for lock in shared.glob(f"{PREFIX}*/{LOCK}"):
        with sole_user(lock, without_locks=False) as is_unused:
            if is_unused:
                shutil.rmtree(lock.parent, ignore_errors=True)


def _leave(folder: Path, lock: int) -> None:
    os.close(lock)
    with sole_user(_turn(folder.parent), TURN_SECONDS) as is_our_turn:
        if is_our_turn:
            _sweep(folder.parent)
