"""Names in shared memory that belong to one run while it lives, and are removed after it.

The processes of a run share Streaming's arrays under names that begin with a number. A run first reserves a number, by
a lock beside the memory, so that runs which start at the same time get different ones even if their temporary folders
or containers differ. The memory of a killed run is removed by the next run that starts.
"""

import functools
import logging
import math
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from composer.utils import dist
from streaming.base.shared import SharedMemory

from d2v_composer.system.compat import named_shared_memory, remove_shared_memory, shared_memory_name
from d2v_composer.system.file_locks import acquire, is_last_user, share, sole_user
from d2v_composer.system.multi_node import gather_objects, raise_on_all_ranks
from d2v_composer.system.temporary_folder import machine_folder

__all__ = ["Reservation", "check_shared_memory", "reserve_for_run", "shared_memory_needed"]

FOLDER = Path("/dev/shm")  # on Linux; elsewhere shared memory is not made of files
IN_USE = "in_use"
# Far above those of other programs, which count from 0. Drawn at random: the resource tracker of a killed process may
# remove its names a moment after its lock is gone.
FIRST_NUMBER, NUM_NUMBERS, ANY_NUMBER = 1_000_000, 9_000_000, "[1-9]" + 6 * "[0-9]"
# Arrays: Streaming's nine, our two, and the locks. Semaphores: the queues and events of one worker.
NUM_ARRAYS, SEMAPHORES = 16, 16
PAGE = os.sysconf("SC_PAGE_SIZE")

log = logging.getLogger(__name__)


class Reservation:
    """A number for names in shared memory, held by a run until the last of its processes on this machine ends.

    Forked processes, such as data workers, count too.

    Args:
        number: The number with which the names begin.
        descriptor: The locked file.

    Attributes:
        memory: The shared memory under the number that this process has opened.
    """

    def __init__(self, number: int, descriptor: int) -> None:
        self.number = number
        self.memory: list[SharedMemory] = []
        self._descriptor = descriptor
        self._pid = os.getpid()

    def given_to_streaming(self, check: Callable[[], None]) -> AbstractContextManager[None]:
        """Make a StreamingDataset that is made within the block use the number.

        Args:
            check: Called once the index is read, before any shared memory is made.
        """
        return named_shared_memory(self.number, _folder(), self.memory, check)

    def release(self) -> None:
        """Remove this process's shared memory and, in the last process of the run, all files under the number."""
        if os.getpid() != self._pid:  # a worker's copy
            return
        try:
            remove_shared_memory(self.memory)
            if is_last_user(self._descriptor):
                _remove_files(self.number)
        finally:  # torch raises from a signal handler if a worker was killed
            os.close(self._descriptor)


def reserve_for_run() -> Reservation:
    """Reserve a number for the ranks of this node, and remove what killed runs left.

    Raises:
        InputError: On all ranks, if the folder of shared memory cannot be written.
    """
    reservation, fault = None, None
    if dist.get_local_rank() == 0:
        _remove_abandoned()
        try:
            reservation = _reserve()
        except OSError as error:
            fault = f"{_folder()}: cannot be written ({error.strerror}); data sets share their state there"
    raise_on_all_ranks(fault)
    numbers = gather_objects(-1 if reservation is None else reservation.number)
    return reservation or _join(numbers[dist.get_global_rank() - dist.get_local_rank()])


def shared_memory_needed(
    num_shards: int,
    num_samples: int,
    ranks: int = 1,
    workers: int = 0,
    prefetch_factor: int = 2,
    batch_bytes: int = 0,
) -> int:
    """Return the bytes of shared memory that training data takes on one machine.

    Args:
        num_shards: The shards of the data set.
        num_samples: The samples of an epoch.
        ranks: The ranks on this machine.
        workers: The workers of each rank, ``train_loader.num_workers``.
        prefetch_factor: The batches that each worker makes in advance.
        batch_bytes: The bytes of one rank's batch: batch size x 3 x height x width for uint8 images.
    """
    # For each shard a state, its last use, and process and thread; the order of an epoch; small arrays of a page.
    arrays = num_shards * (1 + 8 + 16) + num_samples * 8 + NUM_ARRAYS * PAGE
    # Beside those made in advance, each rank has one in the making and one in use.
    batches = ranks * (workers * prefetch_factor + 2) * (batch_bytes + PAGE) if workers else 0
    return arrays + batches + ranks * workers * SEMAPHORES * PAGE


def check_shared_memory(needed: int) -> str | None:
    """Return an error message if fewer bytes of shared memory are free than needed, else ``None``.

    A process that writes more is killed by SIGBUS, without a message.

    Args:
        needed: The bytes; see :func:`shared_memory_needed`.
    """
    if not FOLDER.is_dir():
        return None
    total, used, free = shutil.disk_usage(FOLDER)
    if free >= needed:
        return None
    size = f"{math.ceil((used + needed) / 2**20)}m"
    return (
        f"{FOLDER}: {free:,} of {total:,} bytes are free, training data needs {needed:,}: enlarge it (docker run "
        f"--shm-size={size}, or mount -o remount,size={size} {FOLDER}), or lower train_loader.num_workers or "
        "prefetch_factor"
    )


def _reserve() -> Reservation:
    """Reserve a number that no run on this machine has, of any user, container or temporary folder."""
    while True:
        number = FIRST_NUMBER + secrets.randbelow(NUM_NUMBERS)
        if any(_folder().glob(f"{number}_*")):
            continue
        descriptor = acquire(_file(number, IN_USE))
        if descriptor is None:
            continue
        if share(descriptor):
            return Reservation(number, descriptor)
        os.close(descriptor)


def _join(number: int) -> Reservation:
    """Share the reservation of the node's first rank, which then lasts until this process ends as well."""
    descriptor = acquire(_file(number, IN_USE), shared=True)
    if descriptor is None:
        raise RuntimeError(f"{_file(number, IN_USE)}: reserved for this run, but locked by another")
    return Reservation(number, descriptor)


def _remove_abandoned() -> None:
    """Remove what killed runs of this user left."""
    for lock in FOLDER.glob(f"{ANY_NUMBER}_{IN_USE}"):
        with suppress(OSError), sole_user(lock) as is_abandoned:
            if is_abandoned:
                _remove_files(int(lock.name.split("_")[0]))


def _folder() -> Path:
    """Return the folder for locks: that of the memory, if memory is made of files."""
    if FOLDER.is_dir():
        return FOLDER
    _warn_of_no_folder()
    return machine_folder()


@functools.cache
def _warn_of_no_folder() -> None:
    log.warning("%s: no such folder: all runs on this machine must use the same temporary folder", FOLDER)


def _file(number: int, name: str) -> Path:
    return _folder() / shared_memory_name(number, name)


def _remove_files(number: int) -> None:
    lock = _file(number, IN_USE)
    for path in lock.parent.glob(f"{number}_*"):
        if path != lock:
            path.unlink(missing_ok=True)
    lock.unlink(missing_ok=True)  # last: a file without its lock would never be removed
