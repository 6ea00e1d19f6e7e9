"""A folder for shards of remote data sets, which one process fills and empties at a time."""

import os
import weakref
from pathlib import Path

from d2v_composer.data.shard_cache import ShardCache
from d2v_composer.system.errors import InputError
from d2v_composer.system.file_locks import acquire
from d2v_composer.system.retry import reason

__all__ = ["CacheFolder", "occupy"]

# The workers of a run that was just killed see it within a second, and end.
LAST_USER_LEAVES = 15.0


class CacheFolder:
    """A folder that no other process uses while this one keeps the object.

    Args:
        path: The folder; made where it does not exist.

    Attributes:
        pid: The process that has it.

    Raises:
        InputError: Another process uses it, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        try:
            descriptor = acquire(path / ".in_use", wait=LAST_USER_LEAVES)
        except OSError as error:
            raise InputError(f"{path}: shards cannot be kept there ({reason(error)})") from error
        if descriptor is None:
            raise InputError(f"{path}: another run keeps its shards there: give each a folder of its own")
        self.pid = os.getpid()
        self._user: weakref.ref[ShardCache] | None = None
        weakref.finalize(self, os.close, descriptor)

    def give_to(self, cache: ShardCache) -> None:
        """Let a data set's cache fill and empty the folder, and no longer that of an older data set of this process.

        A notebook's cell that is run again makes the new one while the old one exists.

        Raises:
            InputError: Shards are still being fetched for the older one.
        """
        older = None if self._user is None else self._user()
        if older is not None:
            older.give_way(LAST_USER_LEAVES)
            cache.recount()
        self._user = weakref.ref(cache)


_occupied: weakref.WeakValueDictionary[Path, CacheFolder] = weakref.WeakValueDictionary()


def occupy(path: Path) -> CacheFolder:
    """The folder of this process, made or, where another data set of the process has it, shared with that.

    Raises:
        InputError: Another process uses it, or it cannot be written.
    """
    folder = _occupied.get(path.resolve())
    if folder is None or folder.pid != os.getpid():  # a forked process is another
        folder = _occupied[path.resolve()] = CacheFolder(path)
    return folder
