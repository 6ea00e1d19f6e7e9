"""Measure competing programs in one process, and report their rates with the machine they were measured on."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import features
from torch.profiler import ProfilerActivity, profile

from d2v_composer.report.tables import format_table
from d2v_composer.system.command_line import progress_bar
from d2v_composer.system.machine import describe_machine, package_versions

Pass = Callable[[], object]
"""Does a fixed amount of work; the return value is ignored."""


class Rates(NamedTuple):
    """The rates of one program, in units of work per second."""

    each: list[float]
    """One rate per round; the n-th rates of all programs are of the same round."""

    @property
    def median(self) -> float:
        return statistics.median(self.each)

    def ratio(self, baseline: "Rates") -> float:
        """Return the ratio to a baseline: the median over the rounds, so that a slow round cancels out."""
        return statistics.median(own / other for own, other in zip(self.each, baseline.each, strict=True))

    def scaled(self, factor: float) -> "Rates":
        """Return the rates in another unit, ``factor`` of which equal one of this unit."""
        return Rates([factor * rate for rate in self.each])


class Row(NamedTuple):
    """The result of one program."""

    name: str
    rates: Rates | None
    """``None``: not installed."""
    facts: dict[str, Any]


class Table(NamedTuple):
    """The results of competing programs; the first row is the baseline."""

    title: str
    unit: str
    rows: list[Row]
    columns: Mapping[str, Callable[[dict[str, Any]], str]]
    """Heading → text made of a row's facts."""

    def as_text(self) -> str:
        lines = []
        for name, rates, facts in self.rows:
            cells = ["not installed", "", ""]
            if rates is not None:
                ratio = self.ratio(rates)
                extent = f"{_number(min(rates.each))} – {_number(max(rates.each))}"
                cells = [_number(rates.median), extent, "" if ratio is None else f"{ratio:.2f}"]
            lines.append([name, *cells, *(text(facts) for text in self.columns.values())])
        return format_table([self.title, self.unit, "range", "×", *self.columns], lines)

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                **facts,
                "rates": None if rates is None else rates.each,
                "median": None if rates is None else rates.median,
                "ratio_to_baseline": None if rates is None else self.ratio(rates),
            }
            for name, rates, facts in self.rows
        ]

    def ratio(self, rates: Rates) -> float | None:
        baseline = self.rows[0].rates
        return None if baseline is None else rates.ratio(baseline)


class Target(NamedTuple):
    """A ratio to reach."""

    what: str
    ratio: float | None
    """``None``: one of the two is not installed."""
    at_least: float
    workers: int | None = None

    def __str__(self) -> str:
        if self.ratio is None:
            return f"{self.what}: not measured, not installed"
        missed = f"missed by {1 - self.ratio / self.at_least:.0%}"
        verdict = "reached" if self.ratio >= self.at_least else missed
        return f"{self.what}: {self.ratio:.3g}, target {self.at_least}: {verdict}"


class Result(NamedTuple):
    """The result of a benchmark."""

    title: str
    packages: Sequence[str]
    """Distributions whose versions matter."""
    facts: dict[str, Any]
    tables: list[tuple[str, Table]]
    """JSON key of the rows, and the table; several tables may share a key."""
    targets: list[Target]
    notes: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        rows: dict[str, Any] = {}
        for key, table in self.tables:
            rows.setdefault(key, []).extend(table.as_json())
        targets = [target._asdict() for target in self.targets]
        about = {"machine": describe_machine(), "versions": versions(self.packages)}
        return {**self.facts, **about, **rows, "targets": targets}

    def as_text(self) -> str:
        machine = describe_machine()
        hardware = [f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB", machine["gpu"]]
        software = (f"{name} {version or 'not installed'}" for name, version in versions(self.packages).items())
        head = ["; ".join(str(part) for part in [*hardware, machine["system"]] if part), ", ".join(software)]
        tables = [table.as_text() for _, table in self.tables]
        verdicts = "\n".join([*map(str, self.targets), *self.notes])
        return "\n\n".join(["\n".join([*head, self.title]), *tables, verdicts])


def versions(distributions: Sequence[str]) -> dict[str, str | None]:
    """Return the versions of Python, of distributions (``None``: not installed), and of Pillow's JPEG decoder."""
    turbo, jpeg = features.version_feature("libjpeg_turbo"), features.version_codec("jpg")
    decoder = f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {jpeg}"
    return package_versions(*distributions) | {"pillow's JPEG": decoder}


def _number(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.2f}"


def interleave(
    passes: Mapping[str, Pass],
    work: float,
    rounds: int,
    description: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Rates]:
    """Measure passes in turns, after one warm-up pass of each.

    Args:
        passes: By name.
        work: Units of work of a pass.
        rounds: Number of passes of each that count.
        description: Label of the progress bar.
        clock: In seconds. ``time.process_time`` ignores other processes on the same core, and all waiting.
    """
    rates: dict[str, list[float]] = {name: [] for name in passes}
    names = list(passes)
    with progress_bar(total=len(names) * (rounds + 1), desc=description, unit="passes") as bar:
        for round_number in range(-1, rounds):
            first = max(0, round_number) % len(names)  # so that no pass always follows the same one
            for name in names[first:] + names[:first]:
                bar.set_postfix_str(name)
                begin = clock()
                passes[name]()
                if round_number >= 0:
                    rates[name].append(work / (clock() - begin))
                bar.update()
    return {name: Rates(each) for name, each in rates.items()}


def synchronize(device: str) -> None:
    """Wait until the device has finished."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_allocated(function: Callable[[], object], device: str) -> int:
    """Return the peak of what torch allocates on the device while a function runs, beyond what is held, in bytes."""
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
    changes = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    if not changes:
        return 0
    before = changes[0]["args"]["Total Allocated"] - changes[0]["args"]["Bytes"]
    return max(event["args"]["Total Allocated"] for event in changes) - before


@contextmanager
def one_core() -> Iterator[None]:
    """Keep all threads of this process, present and future, on one core."""
    allowed, num_threads = os.sched_getaffinity(0), torch.get_num_threads()
    torch.set_num_threads(1)
    _pin_threads({max(allowed)})
    try:
        yield
    finally:
        _pin_threads(allowed)
        torch.set_num_threads(num_threads)


def _pin_threads(cores: set[int]) -> None:
    # Setting the affinity of a process affects only its main thread; a new thread inherits that of its creator.
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cores)
