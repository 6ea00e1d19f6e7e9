"""Measure the speed of programs that take turns in one process."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v_composer.evaluation.embedded_set import Embed
from d2v_composer.evaluation.evaluate import Evaluation
from d2v_composer.models.precision import precision_of
from d2v_composer.models.provenance import Json, Record
from d2v_composer.report.tables import format_table
from d2v_composer.system.machine import describe_machine, package_versions
from d2v_composer.system.progress import progress_bar

# Samples that d2v evaluate embeds at once when it measures a model's speed.
BATCH_SIZES = (1, 64)
Rates = NDArray[np.float64]
"""Units of work per second in each of R rounds, (R,)."""


def interleave(passes: Mapping[str, tuple[Callable[[], object], float]], repeats: int) -> dict[str, Rates]:
    """Measure the speed of programs that take turns, after one warm-up pass of each.

    Args:
        passes: Name → a function that does one pass, and the number of units of work in a pass.
        repeats: Number of rounds, in each of which every program does one measured pass.

    Returns:
        Name → units per second in each measured pass.
    """
    names, rates = list(passes), {name: np.empty(repeats) for name in passes}
    for number in progress_bar(range(-1, repeats), desc="measuring", unit="rounds"):
        first = max(0, number) % len(names)  # so that no program always follows the same one
        for name in names[first:] + names[:first]:
            work, units = passes[name]
            start = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= 0:
                rates[name][number] = units / (time.perf_counter() - start)
    return rates


def measure_speeds(
    evaluation: Evaluation,
    noise: Callable[[int], Tensor],
    device: str,
    autocast_dtype: torch.dtype | None,
) -> dict[int, dict[str, float]]:
    """Measure how fast each model embeds; a baseline without parameters is left out.

    Returns:
        Batch size → name of a model → its samples per second, the median over rounds.
    """

    def apply(embed: Embed, batch: Tensor) -> object:
        return embed(batch[:])  # a new tensor: models share tokens of the same one

    speeds = {}
    for size in BATCH_SIZES:
        batch = noise(size).to(device)
        passes = {
            name: (partial(apply, embed, batch), size)
            for embeds in evaluation.groups.values()
            for name, embed in embeds.items()
            if evaluation.costs[name]["num_parameters"]
        }
        with torch.inference_mode(), precision_of(autocast_dtype, device):
            rates = interleave(passes, repeats=5)
        speeds[size] = {name: float(np.median(rounds)) for name, rounds in rates.items()}
    return speeds


def result_of(
    setting: Mapping[str, Json], unit: str, rates: Mapping[str, Rates], compared: Sequence[tuple[str, str]]
) -> Record:
    """Return a benchmark's result for JSON; the ratio of two programs' speeds is the median over rounds."""
    return {
        **setting,
        "machine": describe_machine(),
        "versions": package_versions("simplejpeg", "faiss-cpu"),
        "unit": unit,
        "rows": [{"name": name, "rates": rounds.tolist()} for name, rounds in rates.items()],
        "ratios": [
            {"what": f"{name} ÷ {other}", "ratio": float(np.median(rates[name] / rates[other]))}
            for name, other in compared
        ],
    }


def format_result(result: Mapping[str, Json]) -> str:
    """Return a result of :func:`result_of` as text: the setting, the table and the ratios."""
    settings = [f"{name}: {value}" for name, value in result.items() if name not in ("unit", "rows", "ratios")]
    rows = [[row["name"], *(f"{of(row['rates']):,.2f}" for of in (np.median, min, max))] for row in result["rows"]]
    ratios = [f"{pair['what']}: {pair['ratio']:.2f}" for pair in result["ratios"]]
    return "\n".join([*settings, "", format_table(["", result["unit"], "least", "most"], rows), "", *ratios])


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this thread, and the threads that it starts in the ``with`` block, on one core."""
    allowed, num_threads = os.sched_getaffinity(0), torch.get_num_threads()
    torch.set_num_threads(1)  # torch has started its own
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
        torch.set_num_threads(num_threads)
