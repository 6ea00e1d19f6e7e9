"""Describe the machine, and share its cores; import this module before torch, because it sets environment variables."""

import os
import platform
import re
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from d2v_composer.system.processes import local_ranks

# torch computes on the CPU with a pool of OpenMP threads (libgomp). By default each process has as many threads as
# there are cores, and a thread that waits for the others spins for milliseconds. That is fastest for a process alone on
# its machine; but two such processes on two cores take each other's time slices, and fall to a few percent of their
# speed.
# About 10 microseconds: long enough for the gaps between a training step's operations, too short to waste a time slice.
SPIN_COUNT = 1000
OUR_PACKAGES = ("d2v-composer", "torch", "torchvision", "mosaicml", "mosaicml-streaming", "timm", "omegaconf")


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    with suppress(AttributeError):  # Linux alone has it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_cores() -> None:
    """Set environment variables that divide this machine's cores among its ranks, and let waiting threads sleep early.

    Variables that are already set are kept.
    """
    if local_ranks() > 1:
        # By default, each rank starts up to 32 workers of torch.compile.
        share = max(1, available_cores() // local_ranks())
        os.environ.setdefault("OMP_NUM_THREADS", str(share))
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(share, 32)))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


def describe_machine() -> dict[str, str | int]:
    """Return the processor, GPU ('' for none), number of available cores, memory in GiB and operating system."""
    import psutil
    import torch  # reads what share_cores sets

    models = [platform.processor() or platform.machine()]
    with suppress(OSError):  # Linux alone has it, and names no model for some processors
        models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text("utf-8")) or models
    return {
        "cpu": models[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "cores": available_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.platform(),
    }


def package_versions(*names: str) -> dict[str, str | None]:
    """Return name → version of Python, :data:`OUR_PACKAGES` and ``names``; ``None`` for a missing package."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*OUR_PACKAGES, *names):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


share_cores()
