"""What Streaming shares between the processes of a run: under numbers of ours, and not for longer than there are any.

Streaming counts the runs of a machine from 0. What one that was killed with all its processes had in shared memory
stays there for ever, and those after it open all of it on their way to the next free number.
"""

import atexit
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

from streaming.base.constant import LOCALS
from streaming.base.shared import SharedMemory, prefix

from d2v_composer.locks import acquire, sole_user
from d2v_composer.nodes import NodePlace

__all__ = ["closed_afterwards", "hold", "remove_abandoned", "separate_numbers"]

FOLDER = Path("/dev/shm")  # Linux's; elsewhere nothing is removed
# Other programs' end at the first free number from 0, far below.
FIRST_NUMBER, OUR_NUMBERS = 500_000, "[5-9][0-9][0-9][0-9][0-9][0-9]"


@contextmanager
def separate_numbers(place: NodePlace) -> Iterator[None]:
    """Make Streaming take one of our numbers, of which every ``place.num_nodes``-th is for this node."""
    each_number = prefix._each_prefix_int
    prefix._each_prefix_int = lambda: count(FIRST_NUMBER + place.number, place.num_nodes)
    try:
        yield
    finally:
        prefix._each_prefix_int = each_number


def hold(number: int) -> int | None:
    """Keep a number's shared memory, for as long as the descriptor is open here or in a process forked from this one.

    Returns:
        A descriptor for :func:`os.close`; ``None`` where shared memory is no file.
    """
    path = FOLDER / prefix._get_path(number, LOCALS)
    return acquire(path, shared=True) if path.exists() else None


def remove_abandoned() -> None:
    """Remove what killed runs left, while no other run takes a number."""
    for path in FOLDER.glob(f"{OUR_NUMBERS}_{LOCALS}"):
        with suppress(OSError), sole_user(path) as is_abandoned:  # or another user's
            if is_abandoned:
                parts = FOLDER.glob(f"{path.name.removesuffix(LOCALS)}*")
                for part in sorted(parts, key=lambda part: part == path):  # the one with the lock at last
                    part.unlink(missing_ok=True)


@contextmanager
def closed_afterwards(module: ModuleType) -> Iterator[list[SharedMemory]]:
    """Close the shared memory that a module of Streaming opens within the block, but for what is taken off the list.

    It would be open until the process ends.
    """
    opened: list[SharedMemory] = []

    def open_shared_memory(*args: Any, **kwargs: Any) -> SharedMemory:
        opened.append(SharedMemory(*args, **kwargs))
        return opened[-1]

    patched: Any = module
    patched.SharedMemory = open_shared_memory
    try:
        yield opened
    finally:
        patched.SharedMemory = SharedMemory
        for each in opened:
            atexit.unregister(each.cleanup)
            each.cleanup()
