"""Describe the machine and the installed packages."""

import os
import platform
import re
from importlib import metadata
from pathlib import Path

import psutil
import torch

OUR_PACKAGES = ("d2v-composer", "torch", "torchvision", "mosaicml", "mosaicml-streaming", "timm", "omegaconf")


def describe_machine() -> dict[str, str | int]:
    """Return the processor, GPU ('' for none), cores available to this process, memory and system."""
    return {
        "cpu": [*re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()), platform.machine()][0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.platform(),
    }


def package_versions(*others: str) -> dict[str, str | None]:
    """Return the versions of Python, our packages and other distributions; ``None`` if not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*OUR_PACKAGES, *others):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
