"""Share a machine's cores with other processes. Importing this module sets what torch reads at import.

torch computes on the CPU with a pool of OpenMP threads (libgomp). By default each process has as many threads as there
are cores, and a thread that waits for the others spins for milliseconds. Alone on its machine, that is as fast as it
gets; but two such processes on two cores take each other's time slices, and fall to a few percent of their speed.
"""

import os
from contextlib import suppress

# About 10 microseconds: long enough for the gaps between a training step's operations, too short to waste a time slice.
SPIN_COUNT = 1000


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    with suppress(AttributeError):  # Linux alone has it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_cores() -> None:
    """Divide the cores among the ranks of this machine, and put waiting threads to sleep early.

    torch.compile would start up to 32 workers for each rank. Settings of the user's own (``OMP_NUM_THREADS``,
    ``OMP_WAIT_POLICY``, ``GOMP_SPINCOUNT``, ``TORCHINDUCTOR_COMPILE_THREADS``) are kept.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks > 1:
        share = max(1, available_cores() // ranks)
        os.environ.setdefault("OMP_NUM_THREADS", str(share))
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(share, 32)))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


share_cores()
