"""Let the ranks of a run join, wait for each other and fail together."""

import itertools
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from composer.utils import dist, get_device

from d2v_composer.system.errors import InputError, reason

# Composer's default timeout of every collective: how long a rank waits after another one crashed.
COLLECTIVE_SECONDS = 300.0
# Seconds by which a collective's timeout exceeds the longest wait of a rank for its samples.
LATE_SECONDS = 60
# A leader sends a heartbeat while it works; after SILENT_SECONDS without one, it counts as dead.
BEAT_SECONDS, SILENT_SECONDS, POLL_SECONDS = 5.0, 60.0, 0.2
# Rank 0 holds the store: after a failure it stays until the others have read the reason.
FAREWELL_SECONDS = 3.0
OK, BEAT, BAD_INPUT, FAILED = "ok", "beat ", "input ", "failed "

_turns = itertools.count()


def join_ranks(longest_wait: float) -> None:
    """Initialize torch.distributed if there are several ranks, and run a first collective on this rank's device."""
    device = get_device(None)  # makes a GPU the current device
    if dist.get_world_size() > 1:
        dist.initialize_dist(device, max(COLLECTIVE_SECONDS, longest_wait + LATE_SECONDS))
        # A barrier would not know the device: NCCL would use GPU number rank % GPUs, which is another rank's if a node
        # runs fewer ranks than it has GPUs.
        dist.all_reduce(device.tensor_to_device(torch.zeros(1)))


def node_leaders_first(what: str) -> AbstractContextManager[None]:
    """Let the first rank of each node run a ``with`` block before the other ranks; see :func:`leaders_first`."""
    return leaders_first(range(0, dist.get_world_size(), dist.get_local_world_size()), what)


def rank_zero_first(what: str) -> AbstractContextManager[None]:
    """Let rank 0 run a ``with`` block before the other ranks; see :func:`leaders_first`."""
    return leaders_first([0], what)


@contextmanager
def leaders_first(leaders: Collection[int], what: str) -> Iterator[None]:
    """Let the ranks ``leaders`` run a ``with`` block before the other ranks; all ranks must call this function.

    The block may take hours. ``what`` names the block in errors.
    """
    if dist.get_world_size() == 1:
        yield
        return
    # Not a collective, which would time out, as in Composer's run_local_rank_zero_first.
    store = torch.distributed.distributed_c10d._get_default_store()
    turn, rank = f"d2v_composer/{next(_turns)}", dist.get_global_rank()
    try:
        if rank in leaders:
            with _outcome(store, f"{turn}/{rank}"):
                yield
        # Leaders wait too, or their next collective would wait for the other nodes and time out.
        for leader in leaders:
            _wait(store, f"{turn}/{leader}", f"{what}: rank {leader}")
    except Exception:  # not BaseException: Ctrl-C and SIGTERM reach the other ranks, too
        if rank == 0:
            time.sleep(FAREWELL_SECONDS)
        raise
    if rank not in leaders:
        yield


@contextmanager
def _outcome(store: Any, key: str) -> Iterator[None]:
    """Write heartbeats to torch.distributed's store while the ``with`` block runs, then the block's outcome."""
    ended, outcome = threading.Event(), OK

    def beat() -> None:
        for number in itertools.count():
            store.set(key, f"{BEAT}{number}")
            if ended.wait(BEAT_SECONDS):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        outcome = f"{BAD_INPUT if isinstance(error, InputError) else FAILED}{reason(error)}"
        raise
    finally:
        ended.set()
        thread.join()
        store.set(key, outcome)


def _wait(store: Any, key: str, who: str) -> None:
    """Wait for a leader to end its block; raise an error if the leader failed."""
    last, deadline = "", time.monotonic() + SILENT_SECONDS
    while last != OK:
        try:
            message = store.get(key).decode() if store.check([key]) else ""
        except RuntimeError as error:  # rank 0, which holds the store, has exited
            raise RuntimeError(f"{who} is unreachable ({reason(error)})") from error
        if message.startswith(BAD_INPUT):
            raise InputError(message.removeprefix(BAD_INPUT))
        if message.startswith(FAILED):
            raise RuntimeError(f"{who} failed: {message.removeprefix(FAILED)}")
        if message != last:
            last, deadline = message, time.monotonic() + SILENT_SECONDS
        elif time.monotonic() > deadline:
            raise RuntimeError(f"{who} has not responded for {SILENT_SECONDS:.0f} s")
        else:
            time.sleep(POLL_SECONDS)


def raise_on_all_ranks(fault: str | None) -> None:
    """Raise, on every rank, a fault that any rank found; all ranks must call this function."""
    for problem in dist.all_gather_object(fault):
        if problem is not None:
            raise InputError(problem)
