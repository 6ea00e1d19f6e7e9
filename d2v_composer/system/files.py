"""Keep a run's temporary files in one folder, removed at its end or, after SIGKILL, at the next start."""

import errno
import fcntl
import functools
import getpass
import glob
import logging
import multiprocessing.util
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import tempfile
import time
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from d2v_composer.system.addresses import Address
from d2v_composer.system.errors import InputError

# MERGED FROM d2v_composer/system/files.py: Write local files so that a reader, or a restart after a kill, finds

# NAME.PROCESS-NUMBER.partial; downloaders append suffixes of their own. It ends like no file that we look for.
PARTIAL = re.compile(r"\.\d+-\d+\.partial(\.tmp|\.\w{8})?$")


def existing_folder(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    return next(each for each in (folder, *folder.absolute().parents) if each.is_dir())


def check_out_file(path: Path, *, overwrite: bool = True) -> None:
    """Check, before the work begins, that a file can be written; its folder may not exist yet.

    Args:
        path: The file.
        overwrite: Accept one that exists.

    Raises:
        InputError: The path is a folder or an object store's address, its folder is not writable, or it exists.
    """
    if _is_address(path):
        raise InputError(f"{path}: must be a local file, not in an object store")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a file to write")
    if not overwrite and os.path.lexists(path):
        raise InputError(f"{path}: exists already: choose another file, or append --overwrite")
    if path.is_file() and not os.access(path, os.W_OK):
        raise InputError(f"{path}: cannot be written: it is read-only")
    if (fault := find_unwritable(path.parent)) is not None:
        raise InputError(f"{path}: {fault}")


def find_unwritable(folder: Path) -> str | None:
    """Return why files cannot be written into a folder, which may not exist yet; ``None`` if they can."""
    absolute = folder.absolute()
    existing = next(each for each in (absolute, *absolute.parents) if os.path.lexists(each))
    if not os.path.isdir(existing):
        return f"cannot be written: {existing} is not a folder"
    try:  # permissions do not tell of a read-only file system, nor what root may not do
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        return f"cannot be written: {existing} is not writable ({error.strerror})"
    return None


def _is_address(path: Path) -> bool:
    try:
        return Address.parse(str(path).replace(":/", "://", 1)).is_remote  # Path has dropped one of the slashes
    except ValueError:  # an address with a mistake in it
        return True


@contextmanager
def partial_file(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path to write or download to, and rename it to ``path`` when the block ends.

    Check the content at the end of the block: after an error the temporary file is removed, and ``path`` is as before.
    Several processes and nodes may write the same path at once; the last one wins.

    Args:
        path: The final path. Missing folders are made.
        sync: Flush the file to the disk before the rename, so that it survives a power failure.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.randbits(32)}.partial")
    try:
        yield partial
        if sync:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):  # the first error matters more
            for left in path.parent.glob(f"{glob.escape(partial.name)}*"):  # downloaders write next to it
                left.unlink()
        raise


@contextmanager
def out_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a command's result, see :func:`partial_file`; give it a new file's usual permissions.

    Raises:
        InputError: The disk is full or fails, or a permission is missing.
    """
    try:
        with partial_file(path) as partial:
            partial.touch()
            mode = stat.S_IMODE(partial.stat().st_mode)
            yield partial
            if stat.S_IMODE(partial.stat().st_mode) != mode:  # safetensors lets only the owner read its files
                partial.chmod(mode)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Write a complete file, or leave ``path`` as it was."""
    with partial_file(path) as partial:
        partial.write_bytes(contents.encode() if isinstance(contents, str) else contents)


def find_partials(paths: Collection[Path]) -> Iterator[Path]:
    """Yield the temporary files that killed processes left next to these paths, and no other files."""
    for folder in {path.parent for path in paths}:
        for partial in folder.glob("*.partial*"):
            name = PARTIAL.sub("", partial.name)
            is_ours = name != partial.name and folder / name in paths
            if is_ours and partial.is_file() and not partial.is_symlink():
                yield partial


# MERGED FROM d2v_composer/system/files.py: Lock files, so that one process of a machine uses something at a time.

# Errors of file systems without locks, such as Lustre without its option for them.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
POLL_SECONDS = 0.05

log = logging.getLogger(__name__)


def acquire(path: Path, wait: float = 0, shared: bool = False, without_locks: bool = True) -> int | None:
    """Lock a file while the descriptor is open, in this process or one forked from it.

    Args:
        path: The file; created, with its folders, if missing. Only the holder may remove it.
        wait: Maximum time to wait for another holder, in seconds.
        shared: Allow other shared holders.
        without_locks: Whether a lock counts as taken on a file system without locks, where two processes may hold it.

    Returns:
        A descriptor for :func:`os.close`; ``None`` if the lock is held elsewhere, even in this process.
    """
    deadline = time.monotonic() + wait
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        is_locked = _lock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, without_locks)
        if is_locked and _is_file(descriptor, path):
            return descriptor
        os.close(descriptor)
        if is_locked:  # on a file that its last holder removed; another process may have created a new one
            continue
        if time.monotonic() >= deadline:
            return None
        time.sleep(POLL_SECONDS)


def share(descriptor: int) -> bool:
    """Turn a lock into a shared one; return ``False`` if another process took it instead."""
    return _lock(descriptor, fcntl.LOCK_SH)


def is_last_user(descriptor: int) -> bool:
    """Turn a shared lock into an exclusive one; return ``False`` if others hold it, and the lock may be lost."""
    return _lock(descriptor, fcntl.LOCK_EX)


@contextmanager
def sole_user(path: Path, wait: float = 0, without_locks: bool = True) -> Iterator[bool]:
    """Lock a file as with :func:`acquire` until the block ends; yield ``False`` if the lock is held elsewhere."""
    descriptor = acquire(path, wait, without_locks=without_locks)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            with suppress(OSError):  # on a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # even if forked processes still have it open
            os.close(descriptor)


def _lock(descriptor: int, kind: int, without_locks: bool = True) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _warn_of_no_locks(os.fstat(descriptor).st_dev, str(error))
        return without_locks
    return True


@functools.cache  # one warning for each file system
def _warn_of_no_locks(device: int, error: str) -> None:
    log.warning("this file system has no locks (%s): two runs may use the same files", error)


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


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
