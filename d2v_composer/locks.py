"""One user of a thing at a time, on one machine: a file that is locked.

Not filelock: here forked processes inherit the lock, so that a user that was just killed still counts as one until
its workers are gone.
"""

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["acquire", "sole_user"]

# What file systems answer that do not lock, such as Lustre without its option for it.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)

log = logging.getLogger(__name__)


def acquire(path: Path, wait: float = 0, shared: bool = False) -> int | None:
    """Lock a file for as long as the descriptor is open, in this process or in one forked from it.

    Args:
        path: The file; made, with its folders, where it does not exist. It stays when the lock is gone.
        wait: How long it may take, in seconds, until another user has gone.
        shared: Whether others who share it may have it as well.

    Returns:
        A descriptor for :func:`os.close`; ``None`` where another user, in this process or elsewhere, has the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    while not _lock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
        if time.monotonic() >= deadline:
            os.close(descriptor)
            return None
        time.sleep(0.05)
    return descriptor


@contextmanager
def sole_user(path: Path, wait: float = 0) -> Iterator[bool]:
    """Lock a file, as :func:`acquire` does, until the block ends; ``False``: another user has it."""
    descriptor = acquire(path, wait)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
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
        log.warning("this file system has no locks (%s): nothing keeps two runs from using the same files", error)
    return True
