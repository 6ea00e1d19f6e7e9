"""One user of a thing at a time, on one machine: a file that is locked.

Not filelock: here forked processes inherit the lock, so that a user that was just killed still counts as one until
its workers are gone.
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

# What file systems answer that do not lock, such as Lustre without its option for it.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
POLL_SECONDS = 0.05

log = logging.getLogger(__name__)


def acquire(path: Path, wait: float = 0, shared: bool = False) -> int | None:
    """Lock a file for as long as the descriptor is open, in this process or in one forked from it.

    Args:
        path: The file; made, with its folders, where it does not exist. Only its user may remove it.
        wait: How long it may take, in seconds, until another user has gone.
        shared: Whether others who share it may have it as well.

    Returns:
        A descriptor for :func:`os.close`; ``None`` where another user, in this process or elsewhere, has the lock.
    """
    deadline = time.monotonic() + wait
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        is_locked = _lock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        if is_locked and _is_file(descriptor, path):
            return descriptor
        os.close(descriptor)
        if is_locked:  # on a file that its last user has removed: another may have made a new one
            continue
        if time.monotonic() >= deadline:
            return None
        time.sleep(POLL_SECONDS)


def share(descriptor: int) -> bool:
    """Let others who share the file lock it as well; ``False``: another user has taken it instead."""
    return _lock(descriptor, fcntl.LOCK_SH)


def is_last_user(descriptor: int) -> bool:
    """Lock a shared file for this user alone, if there is no other; if there is, this one's lock may be gone."""
    return _lock(descriptor, fcntl.LOCK_EX)


@contextmanager
def sole_user(path: Path, wait: float = 0) -> Iterator[bool]:
    """Lock a file, as :func:`acquire` does, until the block ends; ``False``: another user has it."""
    descriptor = acquire(path, wait)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            with suppress(OSError):  # where the file system has no locks
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # now, whatever forked processes still have it open
            os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _warn_of_no_locks(os.fstat(descriptor).st_dev, str(error))
    return True


@functools.cache  # once for each file system
def _warn_of_no_locks(device: int, error: str) -> None:
    log.warning("this file system has no locks (%s): nothing keeps two runs from using the same files", error)


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
