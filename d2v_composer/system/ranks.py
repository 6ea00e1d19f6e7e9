"""Ranks of a run: how they join, wait for each other and fail together."""

import functools
import itertools
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from composer.devices import Device
from composer.utils import dist, get_device

from d2v_composer.system.errors import InputError, reason

# Composer's default timeout of every collective: how long a rank waits after another one crashed.
COLLECTIVE_SECONDS = 300.0
# A rank that others wait for sends a heartbeat; after SILENT_SECONDS without one, it counts as dead.
BEAT_SECONDS, SILENT_SECONDS, POLL_SECONDS = 5.0, 300.0, 0.2
# Rank 0 holds the store: after a failure it stays so long at most, until the others have read the reason.
FAREWELL_SECONDS = 10.0


ObjectT = TypeVar("ObjectT")
_turns = itertools.count()


def join_ranks(timeout: float = COLLECTIVE_SECONDS) -> Device:
    """Initialize torch.distributed if there are several ranks, and run a first collective on this rank's device.

    A barrier as the first collective would not know the device: NCCL would use GPU number rank % GPUs, which is another
    rank's if a node runs fewer ranks than it has GPUs.

    Args:
        timeout: Of each collective, in seconds.

    Returns:
        The device; a GPU becomes torch.cuda's current one.
    """
    device = get_device(None)  # makes a GPU the current device
    if dist.get_world_size() > 1:
        dist.initialize_dist(device, timeout)
        dist.all_reduce(device.tensor_to_device(torch.zeros(1)))
        _node_leaders()  # a collective, while all ranks are here
    return device


@contextmanager
def node_leaders_first(what: str) -> Iterator[None]:
    """Let the first rank of each node run a block, such as a download, before the others run it.

    The block may take hours. No collective waits meanwhile: it would time out, as in Composer's
    ``run_local_rank_zero_first``. All ranks must call this.

    Args:
        what: The work, for error messages.

    Raises:
        InputError: On the waiting ranks, if a leader raised it.
        RuntimeError: On the waiting ranks, if a leader failed otherwise or stopped responding.
    """
    with _leaders_first(what, of_each_node=True):
        yield


def num_nodes() -> int:
    """Return the number of machines of the run."""
    return dist.get_world_size() // dist.get_local_world_size()


@contextmanager
def rank_zero_first(what: str) -> Iterator[None]:
    """Let rank 0 run a block before all others run it; see :func:`node_leaders_first`."""
    with _leaders_first(what, of_each_node=False):
        yield


@functools.cache
def _node_leaders() -> tuple[int, ...]:
    """Return the first rank of each node; a collective."""
    return tuple(rank for rank, local in enumerate(gather_objects(dist.get_local_rank())) if local == 0)


@contextmanager
def _leaders_first(what: str, of_each_node: bool) -> Iterator[None]:
    if dist.get_world_size() == 1:
        yield
        return
    leaders = _node_leaders() if of_each_node else (0,)
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    turn, rank = f"d2v_composer/{next(_turns)}", dist.get_global_rank()
    with _farewell(store, f"{turn}/left"):
        if rank in leaders:
            with _heartbeat(store, f"{turn}/{rank}"):
                yield
        # Leaders wait too, or their next collective would wait for the other nodes and time out.
        for leader in leaders:
            _wait(store, f"{turn}/{leader}", f"{what}: rank {leader}")
    if rank not in leaders:
        yield


@contextmanager
def _farewell(store: Any, key: str) -> Iterator[None]:
    """Count the ranks that leave with an error; rank 0 leaves last, for a while."""
    try:
        yield
    except Exception:  # not after Ctrl-C or SIGTERM, which the other ranks get too
        with suppress(RuntimeError):  # rank 0 has left already
            left = store.add(key, 1)
            deadline = time.monotonic() + FAREWELL_SECONDS
            while dist.get_global_rank() == 0 and left < dist.get_world_size() and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
                left = store.add(key, 0)
        raise


@contextmanager
def _heartbeat(store: Any, key: str) -> Iterator[None]:
    """Write to the store that the block is running and, at its end, its outcome."""
    ended = threading.Event()

    def beat() -> None:
        for number in itertools.count():
            store.set(key, json.dumps({"running": number}))
            if ended.wait(BEAT_SECONDS):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    outcome: dict[str, Any] = {"done": True}
    try:
        yield
    except BaseException as error:
        outcome = {"failed": reason(error), "is_input": isinstance(error, InputError)}
        raise
    finally:
        ended.set()
        thread.join()
        store.set(key, json.dumps(outcome))


def _wait(store: Any, key: str, who: str) -> None:
    """Wait until another rank's block is done, polling so that a signal can interrupt."""
    last, last_change = "", time.monotonic()
    while True:
        try:
            message = store.get(key).decode() if store.check([key]) else ""
        except RuntimeError as error:  # rank 0, which holds the store, has ended
            raise RuntimeError(f"{who} is unreachable ({reason(error)})") from error
        state = json.loads(message or "{}")
        if "done" in state:
            return
        if "failed" in state:
            raise InputError(state["failed"]) if state["is_input"] else RuntimeError(f"{who} failed: {state['failed']}")
        if message != last:
            last, last_change = message, time.monotonic()
        elif time.monotonic() - last_change > SILENT_SECONDS:
            raise RuntimeError(f"{who} has not responded for {SILENT_SECONDS:.0f} s")
        time.sleep(POLL_SECONDS)


def gather_objects(mine: ObjectT) -> list[ObjectT]:
    """Return every rank's object, in order of rank; with one rank, no collective runs."""
    return [mine] if dist.get_world_size() == 1 else dist.all_gather_object(mine)


def raise_on_all_ranks(fault: str | None) -> None:
    """Raise a fault that any rank found on every rank, so that no rank waits for one that ended.

    Raises:
        InputError: With the fault of the lowest rank that has one.
    """
    for each in gather_objects(fault):
        if each is not None:
            raise InputError(each)
