"""Measure competing programs in one process, in turns, and report their rates beside each other."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from d2v_composer.report.tables import format_table
from d2v_composer.system.command_line import progress_bar
from d2v_composer.system.machine import describe_machine, package_versions

Rates = NDArray[np.float64]
"""Units of work per second, (R,): the n-th rates of all programs are from the same round."""


def interleave(
    passes: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Rates]:
    """Return each program's passes per second, measured in turns after one warm-up pass of each.

    Args:
        passes: Name → a fixed amount of work.
        rounds: Measured passes of each program.
        clock: In seconds.
    """
    names, rates = list(passes), {name: np.empty(rounds) for name in passes}
    with progress_bar(total=len(names) * (rounds + 1), desc="measuring", unit="passes") as bar:
        for number in range(-1, rounds):
            first = max(0, number) % len(names)  # so that no program always follows the same one
            for name in names[first:] + names[:first]:
                begin = clock()
                passes[name]()
                if number >= 0:
                    rates[name][number] = 1 / (clock() - begin)
                bar.update()
    return rates


def ratio(own: Rates, baseline: Rates) -> float:
    """Return the median ratio over the rounds: a slow round slows both and cancels out."""
    return float(np.median(own / baseline))


class Result(NamedTuple):
    """A benchmark's table; its first row is the baseline."""

    title: str
    unit: str
    setting: dict[str, Any]
    rates: Mapping[str, Rates]
    ratios: list[tuple[str, float, float | None]]
    """What is compared, the ratio, and the least that is promised, if anything is."""
    packages: tuple[str, ...] = ("torch",)
    """Distributions whose versions matter."""

    def as_text(self) -> str:
        baseline = next(iter(self.rates.values()))
        rows = [
            [name, f"{np.median(each):,.2f}", f"{each.min():,.2f} – {each.max():,.2f}", f"{ratio(each, baseline):.2f}"]
            for name, each in self.rates.items()
        ]
        ratios = [
            f"{what}: {found:.2f}{'' if least is None else f', expected at least {least}'}"
            for what, found, least in self.ratios
        ]
        about = [self.title, str(describe_machine()), str(package_versions(*self.packages))]
        return "\n".join([*about, "", format_table(["", self.unit, "range", "×"], rows), "", *ratios])

    def as_json(self) -> dict[str, Any]:
        baseline = next(iter(self.rates.values()))
        rows = [
            {"name": name, "rates": each.tolist(), "ratio_to_baseline": ratio(each, baseline)}
            for name, each in self.rates.items()
        ]
        ratios = [{"what": what, "ratio": found, "at_least": least} for what, found, least in self.ratios]
        about = {"machine": describe_machine(), "versions": package_versions(*self.packages)}
        return {**self.setting, **about, "unit": self.unit, "rows": rows, "ratios": ratios}


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
    # The affinity of a process is that of its main thread; a new thread inherits its creator's.
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cores)
