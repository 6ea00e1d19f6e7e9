"""The folder that keeps the shards of a remote data set, used by one run at a time."""

import os
import weakref
from pathlib import Path

from d2v_composer.data.shard_cache import ShardCache
from d2v_composer.system.errors import InputError
from d2v_composer.system.file_locks import acquire
from d2v_composer.system.retry import reason

__all__ = ["CacheFolder"]

# The workers of a killed run notice within a second, and end.
LAST_USER_LEAVES = 15.0

_occupied: "weakref.WeakValueDictionary[Path, CacheFolder]" = weakref.WeakValueDictionary()


class CacheFolder:
    """A folder that no other process can occupy while this object exists.

    Args:
        path: The folder; it is made if it does not exist.

    Attributes:
        pid: The process that occupies it.

    Raises:
        InputError: Another process occupies the folder, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        try:
            descriptor = acquire(path / ".in_use", wait=LAST_USER_LEAVES)
        except OSError as error:
            raise InputError(f"{path}: shards cannot be kept there ({reason(error)})") from error
        if descriptor is None:
            raise InputError(f"{path}: another run keeps its shards there: give each run its own folder")
        self.pid = os.getpid()
        self._user: weakref.ref[ShardCache] | None = None
        weakref.finalize(self, os.close, descriptor)

    @classmethod
    def occupy(cls, path: Path) -> "CacheFolder":
        """Return the folder of this process: a new object, or that of another data set of this process.

        Raises:
            InputError: Another process occupies the folder, or it cannot be written.
        """
        folder = _occupied.get(path.resolve())
        if folder is None or folder.pid != os.getpid():  # a forked process inherits the object, not the right
            folder = _occupied[path.resolve()] = cls(path)
        return folder

    def give_to(self, cache: ShardCache) -> None:
        """Let this cache use the folder, instead of the cache of an older data set of this process.

        A notebook cell that is run again makes the new data set while the old one exists.

        Raises:
            InputError: Shards are still being fetched for the older one.
        """
        older = None if self._user is None else self._user()
        if older is not None:
            older.give_way(LAST_USER_LEAVES)
        self._user = weakref.ref(cache)
