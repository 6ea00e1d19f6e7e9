"""The temporary files of a run in one folder, which goes with it; or, after SIGKILL, with the next start."""

import multiprocessing.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from d2v_composer.locks import acquire, sole_user

__all__ = ["machine_lock", "use_scratch_folder"]

PREFIX = f"d2v-{os.getuid()}-"
LOCK = ".in_use"
# multiprocessing binds sockets 33 characters further down. A socket's name has 107 at most; a DataLoader would hang.
LONGEST_PATH = 70
# After multiprocessing's own (-100), and what uses it.
LAST_OF_ALL = -200
TURN_SECONDS = 60.0


def machine_lock(name: str) -> Path:
    """A lock that all runs of a user on this machine share: a file in the temporary folder, which stays there."""
    return machine_folder() / f"{PREFIX}{name}.lock"


def machine_folder() -> Path:
    folder = Path(tempfile.gettempdir())
    return folder.parent if folder.name.startswith(PREFIX) else folder


def use_scratch_folder() -> None:
    """Keep what this process and its children put into the temporary folder below one folder of ours.

    It is the same one for all ranks of a run on this machine, and is removed when the last of them ends. Those that
    killed runs left, with copies of checkpoints in them that were on their way to a store, are removed now.
    """
    shared = machine_folder()
    if Path(tempfile.gettempdir()) != shared:
        return  # a child, or a second call
    folder = shared / f"{PREFIX}{os.environ.get('MASTER_PORT', f'p{os.getpid()}')}-{os.environ.get('NODE_RANK', '0')}"
    if len(str(folder)) > LONGEST_PATH:
        return
    with sole_user(machine_lock("scratch"), TURN_SECONDS) as is_our_turn:
        if not is_our_turn:
            return
        _sweep(shared)
        lock = acquire(folder / LOCK, wait=TURN_SECONDS, shared=True)
    if lock is None:
        return
    multiprocessing.util.Finalize(None, _leave, (folder, lock), exitpriority=LAST_OF_ALL)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # which is to stay
    if (remote_modules := sys.modules.get("torch.distributed.nn.jit.instantiator")) is not None:
        remote_modules._TEMP_DIR.cleanup()  # made when torch is imported, for what nobody uses here
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)


def _sweep(shared: Path) -> None:
    """Remove the folders that nobody uses any more."""
    for lock in shared.glob(f"{PREFIX}*/{LOCK}"):
        with sole_user(lock) as nobody_uses_it:
            if nobody_uses_it:
                shutil.rmtree(lock.parent, ignore_errors=True)


def _leave(folder: Path, lock: int) -> None:
    os.close(lock)
    with sole_user(machine_lock("scratch"), TURN_SECONDS) as is_our_turn:
        if is_our_turn:
            _sweep(folder.parent)
