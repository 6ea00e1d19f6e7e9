"""Describe the machine and the installed packages."""

import platform
import re
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import psutil
import torch

from d2v_composer.system.cpu_threads import available_cores

OUR_PACKAGES = ("d2v-composer", "torch", "torchvision", "mosaicml", "mosaicml-streaming", "timm", "omegaconf")


def describe_machine() -> dict[str, str | int]:
    """Return the processor, GPU ('' for none), cores available to this process, memory and system."""
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


def package_versions(*others: str) -> dict[str, str | None]:
    """Return the versions of Python, our packages and other distributions; ``None`` if not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*OUR_PACKAGES, *others):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
