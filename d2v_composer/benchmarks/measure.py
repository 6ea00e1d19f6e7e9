"""Rates of things that compete in one process, and the machine that they were measured on."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from PIL import features

__all__ = ["Pass", "Rates", "describe_machine", "interleave", "one_core", "versions"]

Pass = Callable[[], object]
"""Does a fixed piece of work; what it returns means nothing."""


class Rates(NamedTuple):
    """What was measured of one contender, in units of work a second."""

    each: list[float]
    """A rate for each round; all contenders' n-th rates are of the same round."""

    @property
    def median(self) -> float:
        return statistics.median(self.each)

    def ratio(self, baseline: "Rates") -> float:
        """How many times the baseline: the median over the rounds, so that what slows a whole round drops out."""
        return statistics.median(own / other for own, other in zip(self.each, baseline.each, strict=True))


def interleave(
    passes: Mapping[str, Pass],
    work: int,
    rounds: int,
    progress: Callable[[str], None],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Rates]:
    """Measure contenders in turns, after one pass each that does not count.

    Args:
        passes: By name.
        work: How many units of work a pass does.
        rounds: How many passes count.
        progress: Called with a name before each pass.
        clock: In seconds. ``time.process_time`` leaves out what others did on the same core, and all waiting.
    """
    rates: dict[str, list[float]] = {name: [] for name in passes}
    names = list(passes)
    for name in names:
        progress(name)
        passes[name]()
    for round_number in range(rounds):
        first = round_number % len(names)  # nobody always comes after the same one, or in the same part of a round
        for name in names[first:] + names[:first]:
            progress(name)
            begin = clock()
            passes[name]()
            rates[name].append(work / (clock() - begin))
    return {name: Rates(each) for name, each in rates.items()}


@contextmanager
def one_core() -> Iterator[None]:
    """Keep all of this process, its threads of before, of now and of later, on one core."""
    allowed = os.sched_getaffinity(0)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _pin_threads({max(allowed)})
    try:
        yield
    finally:
        _pin_threads(allowed)
        torch.set_num_threads(num_threads)


def _pin_threads(cores: set[int]) -> None:
    # The affinity of a process is its main thread's alone; a new thread inherits that of the one that starts it.
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cores)


def describe_machine() -> dict[str, str | int]:
    """Processor, cores that this process may use, memory, system."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.platform(),
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def versions(*distributions: str) -> dict[str, str | None]:
    """Of Python, of installed distributions (``None``: not installed), and of the JPEG decoder in Pillow."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    turbo, jpeg = features.version_feature("libjpeg_turbo"), features.version_codec("jpg")
    return found | {"pillow's JPEG": f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {jpeg}"}
