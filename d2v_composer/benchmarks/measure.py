"""Rates of things that compete in one process, and the machine that they were measured on."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import features
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from d2v_composer.system.machine_info import package_versions

__all__ = [
    "Pass",
    "Rates",
    "Target",
    "describe_setting",
    "interleave",
    "one_core",
    "peak_allocated",
    "progress_bar",
    "synchronise",
    "versions",
]

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

    def scaled(self, factor: float) -> "Rates":
        """In another unit of work, of which one of these has ``factor``."""
        return Rates([factor * rate for rate in self.each])


class Target(NamedTuple):
    """A ratio that should be reached, and was or was not."""

    what: str
    ratio: float | None
    """``None``: what it compares with is not installed."""
    at_least: float

    @property
    def verdict(self) -> str:
        if self.ratio is None:
            return f"{self.what}: not measured, something is not installed"
        missed = f"missed by {1 - self.ratio / self.at_least:.0%}"
        verdict = "reached" if self.ratio >= self.at_least else missed
        return f"{self.what}: {self.ratio:.3g}, to be {self.at_least} or more: {verdict}"


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
def progress_bar(description: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar of so many passes; gives what is called with a pass's name when it begins."""
    with tqdm(total=total, desc=description, unit="pass") as bar:

        def progress(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        yield progress


def synchronise(device: str) -> None:
    """Wait until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_allocated(function: Callable[[], object], device: str) -> int:
    """What torch allocates on the device while a function runs, at its peak and beyond what was there, in bytes."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    if not changes:
        return 0
    before = changes[0]["args"]["Total Allocated"] - changes[0]["args"]["Bytes"]
    return max(event["args"]["Total Allocated"] for event in changes) - before


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


def describe_setting(machine: Mapping[str, str | int], versions: Mapping[str, str | None]) -> list[str]:
    """Machine and versions in a line each."""
    hardware = [f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB", machine["gpu"]]
    return [
        "; ".join(str(part) for part in [*hardware, machine["system"]] if part),
        ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items()),
    ]


def versions(*distributions: str) -> dict[str, str | None]:
    """Of Python, of installed distributions (``None``: not installed), and of the JPEG decoder in Pillow."""
    turbo, jpeg = features.version_feature("libjpeg_turbo"), features.version_codec("jpg")
    return package_versions(*distributions) | {
        "pillow's JPEG": f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {jpeg}"
    }
