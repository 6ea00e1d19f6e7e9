"""The ranks of a run: how they meet, how they wait for each other, and nodes that share a machine or a folder."""

import functools
import itertools
import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from composer.devices import Device
from composer.utils import dist, get_device

from d2v_composer.system.errors import InputError
from d2v_composer.system.retry import reason

__all__ = [
    "COLLECTIVE_SECONDS",
    "gather_objects",
    "join_ranks",
    "node_leaders_first",
    "raise_on_all_ranks",
    "rank_zero_first",
    "separate_signal_files",
]

# Composer's own time-out, of every collective: after a crash elsewhere a rank waits no longer.
COLLECTIVE_SECONDS = 300.0
# A rank that others wait for says so often that it is alive; one that is silent for so long is given up.
BEAT_SECONDS, SILENT_SECONDS, POLL_SECONDS = 5.0, 300.0, 0.2

ObjectT = TypeVar("ObjectT")
_turns = itertools.count()


def join_ranks(timeout: float = COLLECTIVE_SECONDS) -> Device:
    """Initialize torch.distributed where there are several ranks, with a first collective on this rank's device.

    A barrier, as the first one, would not know the device: NCCL would take GPU number rank % GPUs, which is another
    rank's where a node runs fewer ranks than it has GPUs.

    Args:
        timeout: Of each collective, in seconds.

    Returns:
        The device, which is torch.cuda's current one from now on.
    """
    device = get_device(None)  # of a GPU, it sets the current device
    if dist.get_world_size() > 1:
        dist.initialize_dist(device, timeout)
        dist.all_reduce(device.tensor_to_device(torch.zeros(1)))
        _node_leaders()  # while all are here
    return device


@contextmanager
def node_leaders_first(what: str) -> Iterator[None]:
    """Let the first rank of each node run a block, such as a download, before the others run it.

    It may take hours: no collective waits meanwhile, which would time out, as in Composer's
    ``run_local_rank_zero_first``. All ranks have to come here.

    Args:
        what: The work, for the message of a rank that waits in vain.

    Raises:
        InputError: In the ranks that wait: a first rank refused its input.
        RuntimeError: In the ranks that wait: a first rank failed, or gives no sign of life.
    """
    if dist.get_world_size() == 1:
        yield
        return
    with _leaders_first(_node_leaders(), what):
        yield


@contextmanager
def rank_zero_first(what: str) -> Iterator[None]:
    """Let rank 0 run a block before all others run it: as :func:`node_leaders_first`."""
    if dist.get_world_size() == 1:
        yield
        return
    with _leaders_first((0,), what):
        yield


@functools.cache
def _node_leaders() -> tuple[int, ...]:
    """The first rank of each node; a collective."""
    return tuple(rank for rank, local in enumerate(gather_objects(dist.get_local_rank())) if local == 0)


@contextmanager
def _leaders_first(leaders: tuple[int, ...], what: str) -> Iterator[None]:
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    turn, rank = f"d2v_composer/{next(_turns)}", dist.get_global_rank()
    if rank in leaders:
        with _signs_of_life(store, f"{turn}/{rank}"):
            yield
    # Leaders wait as well: whoever went on would wait for the other nodes in its next collective.
    for leader in leaders:
        _await(store, f"{turn}/{leader}", f"{what}: rank {leader}")
    if rank not in leaders:
        yield


@contextmanager
def _signs_of_life(store: Any, key: str) -> Iterator[None]:
    """Write into the store that the block is running, and what came of it."""
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


def _await(store: Any, key: str, who: str) -> None:
    """Wait until the block of another rank is done, in steps that a signal can interrupt."""
    heard, heard_at = "", time.monotonic()
    while True:
        try:
            said = store.get(key).decode() if store.check([key]) else ""
        except RuntimeError as error:  # rank 0, which keeps the store, is gone
            raise RuntimeError(f"{who} cannot be asked any more ({reason(error)})") from error
        state = json.loads(said or "{}")
        if "done" in state:
            return
        if "failed" in state:
            raise InputError(state["failed"]) if state["is_input"] else RuntimeError(f"{who} failed: {state['failed']}")
        if said != heard:
            heard, heard_at = said, time.monotonic()
        elif time.monotonic() - heard_at > SILENT_SECONDS:
            raise RuntimeError(f"{who} has given no sign of life for {SILENT_SECONDS:.0f} s")
        time.sleep(POLL_SECONDS)


def gather_objects(mine: ObjectT) -> list[ObjectT]:
    """Every rank's object, in their order; no collective where there is one rank."""
    return [mine] if dist.get_world_size() == 1 else dist.all_gather_object(mine)


def raise_on_all_ranks(fault: str | None) -> None:
    """End all ranks for a fault that one of them found; the others would wait for it.

    Raises:
        InputError: On every rank, with the first rank's fault that has one.
    """
    for each in gather_objects(fault):
        if each is not None:
            raise InputError(each)


@contextmanager
def separate_signal_files() -> Iterator[None]:
    """Give each node its own of the files with which its first rank calls the others, and which it then deletes.

    Composer 0.32 gives all nodes rank 0's name: in a folder that they share, each deletes the others' file.
    """
    common_name = dist.get_node_signal_file_name

    def name_of_this_node(rng: random.Random | None = None) -> str:
        return f"{common_name(rng)}_{dist.get_node_rank()}"

    dist.get_node_signal_file_name = name_of_this_node
    try:
        yield
    finally:
        dist.get_node_signal_file_name = common_name
