"""Lock files, so that one process of a machine uses something at a time.

Unlike with filelock, forked processes inherit the lock: a killed process holds it until its workers have ended.
"""

import errno
import fcntl
import functools
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["acquire", "is_last_user", "share", "sole_user"]

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
