"""The temporary files of a run in one folder, which goes with it; or, after SIGKILL, with the next start."""

import multiprocessing.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from d2v_composer.system.errors import InputError
from d2v_composer.system.file_locks import acquire, sole_user

__all__ = ["machine_folder", "use_temporary_folder"]

PREFIX = f"d2v-{os.getuid()}-"
LOCK = ".in_use"
# multiprocessing binds sockets 33 characters further down. A socket's name has 107 at most; a DataLoader would hang.
LONGEST_PATH = 70
# For sockets, where the temporary folder's path is longer; what else is temporary may be too large for memory.
SHORT_FOLDERS = ("/tmp", "/dev/shm")
# After multiprocessing's own (-100), and what uses it.
LAST_OF_ALL = -200
TURN_SECONDS = 60.0


def machine_folder() -> Path:
    """The temporary folder that all runs of a user on this machine have in common, if their TMPDIR is the same."""
    folder = Path(tempfile.gettempdir())
    return folder.parent if folder.name.startswith(PREFIX) else folder


def use_temporary_folder() -> None:
    """Keep what this process and its children put into the temporary folder below one folder of ours.

    It is the same one for all ranks of a run on this machine, and is removed when the last of them ends. Those that
    killed runs left, with copies of checkpoints in them that were on their way to a store, are removed now.

    Raises:
        InputError: The temporary folder's path is too long for a socket, and there is no shorter one.
    """
    shared = machine_folder()
    is_ours_already = Path(tempfile.gettempdir()) != shared  # in a child, or a second call
    folder = None if is_ours_already else _enter(shared)
    if folder is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # which is to stay
        if (remote_modules := sys.modules.get("torch.distributed.nn.jit.instantiator")) is not None:
            remote_modules._TEMP_DIR.cleanup()  # made when torch is imported, for what nobody uses here
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    if len(tempfile.gettempdir()) > LONGEST_PATH:
        _use_short_folder_for_sockets()


def _enter(shared: Path) -> Path | None:
    """A folder for this run's ranks, held until this process ends; ``None``: others are at it for too long."""
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
    """A lock for those who make or remove folders; it stays."""
    return shared / f"{PREFIX}scratch.lock"


def _use_short_folder_for_sockets() -> None:
    long_path = tempfile.gettempdir()
    for shared in filter(_is_writable, map(Path, SHORT_FOLDERS)):
        if (folder := _enter(shared)) is not None:
            tempfile.tempdir = str(folder)
            multiprocessing.util.get_temp_dir()  # made now, and used by this process and its children from now on
            tempfile.tempdir = long_path
            return
    raise InputError(
        f"TMPDIR: must have at most {LONGEST_PATH} characters where none of {', '.join(SHORT_FOLDERS)} can be written, "
        f"got {len(long_path)}: {long_path}"
    )


def _is_writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _sweep(shared: Path) -> None:
    """Remove the folders that nobody uses any more."""
    for lock in shared.glob(f"{PREFIX}*/{LOCK}"):
        with sole_user(lock) as nobody_uses_it:
            if nobody_uses_it:
                shutil.rmtree(lock.parent, ignore_errors=True)


def _leave(folder: Path, lock: int) -> None:
    os.close(lock)
    with sole_user(_turn(folder.parent), TURN_SECONDS) as is_our_turn:
        if is_our_turn:
            _sweep(folder.parent)
