"""Describe the machine and the installed packages, and compare them with what this package needs."""

import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

OUR_PACKAGES = ("d2v-composer", "torch", "torchvision", "mosaicml", "mosaicml-streaming", "timm", "omegaconf")


def describe_machine() -> dict[str, str | int]:
    """Return processor, GPU ('' for none), cores available to this process, memory and system."""
    return {
        "cpu": _cpu_model(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.platform(),
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def package_versions(*distributions: str) -> dict[str, str | None]:
    """Return the versions of Python and of distributions; ``None`` if not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def find_wrong_packages(extra: str = "") -> Iterator[str]:
    """Yield a line for each package that is missing or has another version, with the command that installs it.

    Args:
        extra: Look at what this extra adds; default: at what every installation needs.
    """
    for wanted in requirements_of(extra):
        install = install_command(extra, wanted.name)
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            yield f"needs the package {wanted.name}: {install}"
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            yield f"does not work with {wanted.name} {version}: {install}"


def install_command(extra: str, *names: str) -> str:
    """Return the command that installs these packages of an extra.

    pip cannot find an extra of this package, which is in no index.
    """
    wanted = (f"'{each.name}{each.specifier}'" for each in requirements_of(extra) if each.name in names)
    return f"pip install {' '.join(wanted)}"


def requirements_of(extra: str) -> Iterator[Requirement]:
    """Yield what an extra of this package adds, nothing if there is no such extra; '' is the package itself."""
    for line in metadata.requires("d2v-composer") or []:
        requirement = Requirement(line)
        marker = requirement.marker
        in_all = marker is None or marker.evaluate({"extra": ""})
        if in_all if not extra else marker is not None and not in_all and marker.evaluate({"extra": extra}):
            yield requirement
