"""Measure the speed of programs that take turns in one process."""

import time
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v_composer.evaluation.embedded_set import Embed
from d2v_composer.evaluation.evaluate import Evaluation
from d2v_composer.models.precision import precision_of
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
