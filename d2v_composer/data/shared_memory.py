"""Names in shared memory that belong to one run as long as it lives, and are removed after it.

The processes of a run share Streaming's arrays under names that begin with a number. Streaming looks for a free number
and takes it a moment later, so that runs which start at once may take the same one; what a killed run had stays for
ever. Here a number is reserved first, by a lock that lies where the memory is: neither another folder for temporary
files nor another container's process ids matter there.
"""

import atexit
import functools
import logging
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from composer.utils import dist
from streaming.base import dataset as streaming_dataset
from streaming.base.shared import SharedMemory, array, prefix

from d2v_composer.system.file_locks import acquire, is_last_user, share, sole_user
from d2v_composer.system.multi_node import gather_objects, raise_on_all_ranks
from d2v_composer.system.temporary_folder import machine_folder

__all__ = [
    "Reservation",
    "check_shared_memory",
    "closed_afterwards",
    "opened_shared_memory",
    "reserve_for_run",
    "shared_memory_needed",
]

FOLDER = Path("/dev/shm")  # Linux's; elsewhere shared memory is no file
IN_USE = "in_use"
# Far above those of other programs, which count from 0. Drawn at random: a killed process's resource tracker may remove
# its names a moment after its lock is gone.
FIRST_NUMBER, NUM_NUMBERS, ANY_NUMBER = 1_000_000, 9_000_000, "[1-9]" + 6 * "[0-9]"
# Streaming's nine, the fetchers', and the file locks; of a worker: queues and events.
NUM_ARRAYS, SEMAPHORES = 16, 16
PAGE = os.sysconf("SC_PAGE_SIZE")

log = logging.getLogger(__name__)


class Reservation:
    """A number for names in shared memory, this run's alone until the last of its processes here has gone.

    Forked processes, such as data workers, count as long as they live.

    Args:
        number: The first part of the names.
        descriptor: Of the locked file.

    Attributes:
        memory: The shared memory that goes with the reservation; whoever opens some adds it.
    """

    def __init__(self, number: int, descriptor: int) -> None:
        self.number = number
        self.memory: list[SharedMemory] = []
        self._descriptor = descriptor
        self._pid = os.getpid()

    @contextmanager
    def given_to_streaming(self, check: Callable[[], None]) -> Iterator[None]:
        """Make a StreamingDataset that is made within the block use the number, and lock where its memory is.

        Ranks of one run that have different temporary folders would not exclude each other.

        Args:
            check: Called when the index is read, and before any shared memory is taken.
        """
        patched: Any = streaming_dataset
        own_prefix, own_folder = patched.get_shm_prefix, patched.gettempdir

        def get_shm_prefix(*_: Any, **__: Any) -> tuple[int, None]:
            check()
            return self.number, None  # nothing reads Streaming's list of folders, by which it finds a free number

        patched.get_shm_prefix, patched.gettempdir = get_shm_prefix, lambda: str(_folder())
        try:
            with opened_shared_memory(array, self.memory):
                yield
        finally:
            patched.get_shm_prefix, patched.gettempdir = own_prefix, own_folder

    def release(self) -> None:
        """Remove this process's shared memory and, in the last process of the run, everything under the number."""
        if os.getpid() != self._pid:  # a worker's copy
            return
        try:
            while self.memory:
                _remove(self.memory.pop())
            if is_last_user(self._descriptor):
                _remove_files(self.number)
        finally:  # torch raises from a signal's handler where a worker was killed
            os.close(self._descriptor)


def reserve_for_run() -> Reservation:
    """Reserve a number for the ranks of this node, and remove what killed runs left.

    Raises:
        InputError: On all ranks, where there can be no file beside the shared memory.
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


@contextmanager
def opened_shared_memory(module: ModuleType, opened: list[SharedMemory]) -> Iterator[None]:
    """Add to a list the shared memory that a module of Streaming opens within the block."""

    def open_shared_memory(*args: Any, **kwargs: Any) -> SharedMemory:
        opened.append(SharedMemory(*args, **kwargs))
        return opened[-1]

    patched: Any = module
    patched.SharedMemory = open_shared_memory
    try:
        yield
    finally:
        patched.SharedMemory = SharedMemory


@contextmanager
def closed_afterwards(module: ModuleType) -> Iterator[None]:
    """Close the shared memory that a module of Streaming opens within the block; it would be open until the end."""
    opened: list[SharedMemory] = []
    try:
        with opened_shared_memory(module, opened):
            yield
    finally:
        while opened:
            _remove(opened.pop())


def shared_memory_needed(
    num_shards: int,
    num_samples: int,
    ranks: int = 1,
    workers: int = 0,
    prefetch_factor: int = 2,
    batch_bytes: int = 0,
) -> int:
    """Shared memory that training data takes on one machine, in bytes.

    Args:
        num_shards: Of the data set.
        num_samples: Of an epoch.
        ranks: On this machine.
        workers: Of each rank, ``train_loader.num_workers``.
        prefetch_factor: Batches that each worker makes in advance.
        batch_bytes: Of one rank's batch: batch size x 3 x height x width for uint8 images.
    """
    # Streaming's arrays, in pages: a state and two numbers for each shard, the order of an epoch, small ones.
    arrays = num_shards * (1 + 8 + 8) + num_samples * 8 + NUM_ARRAYS * PAGE
    # Beside those made in advance, one is being made by each worker's rank, and one is in use.
    batches = ranks * (workers * prefetch_factor + 2) * (batch_bytes + PAGE) if workers else 0
    return arrays + batches + ranks * workers * SEMAPHORES * PAGE


def check_shared_memory(needed: int) -> str | None:
    """The fault, in one line, of shared memory with too few bytes free; ``None``: it has enough.

    A process that writes beyond them is killed (SIGBUS) and says nothing.

    Args:
        needed: In bytes; see :func:`shared_memory_needed`.
    """
    if not FOLDER.is_dir():
        return None
    total, used, free = shutil.disk_usage(FOLDER)
    if free >= needed:
        return None
    size = f"{math.ceil((used + needed) / 2**20)}m"
    return (
        f"{FOLDER}: {free:,} of {total:,} bytes are free, training data takes {needed:,}: enlarge it (docker run "
        f"--shm-size={size}, or mount -o remount,size={size} {FOLDER}), or lower train_loader.num_workers or "
        "prefetch_factor"
    )


def _reserve() -> Reservation:
    """Take a number that no run of this machine has, whatever its user, container or temporary folder."""
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
    """The reservation of the node's first rank, which lasts until this process has gone as well."""
    descriptor = acquire(_file(number, IN_USE), shared=True)
    if descriptor is None:
        raise RuntimeError(f"{_file(number, IN_USE)}: locked by another run, although it was reserved for this one")
    return Reservation(number, descriptor)


def _remove_abandoned() -> None:
    """Remove what killed runs left, except other users'."""
    for lock in FOLDER.glob(f"{ANY_NUMBER}_{IN_USE}"):
        with suppress(OSError), sole_user(lock) as is_abandoned:
            if is_abandoned:
                _remove_files(int(lock.name.split("_")[0]))


def _folder() -> Path:
    """The folder for locks and file locks: beside the memory, where that is files."""
    if FOLDER.is_dir():
        return FOLDER
    _warn_of_no_folder()
    return machine_folder()


@functools.cache
def _warn_of_no_folder() -> None:
    log.warning("%s: no such folder: runs on this machine must have one temporary folder in common", FOLDER)


def _file(number: int, name: str) -> Path:
    return _folder() / prefix._get_path(number, name)


def _remove(memory: SharedMemory) -> None:
    """Give up shared memory that Streaming keeps until the process ends; it is closed with the last array on it."""
    atexit.unregister(memory.cleanup)
    for created in memory.created_shms:
        with suppress(FileNotFoundError):
            created.unlink()


def _remove_files(number: int) -> None:
    lock = _file(number, IN_USE)
    for path in lock.parent.glob(f"{number}_*"):
        if path != lock:
            path.unlink(missing_ok=True)
    lock.unlink(missing_ok=True)  # at last: without it the others would be nobody's
