"""Measure in turns how fast photos are decoded, a model embeds, and both together, as ``d2v embed`` does on a CPU.

    OMP_NUM_THREADS=2 python tests/makers/embedding_rate.py MODEL PHOTOS [ROUNDS]

Rates are of wall-clock time and of CPU time, which tells more where other work runs. The last lines have the rate of
both as a share of what the two alone allow: 1 / (1 / decoding + 1 / model), the median over rounds.
"""

import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from d2v_composer import Embedder
from d2v_composer.embedding.embed_source import embed_batch, load_batch
from d2v_composer.sources.open import open_source

BATCH, BATCHES = 64, 4
CLOCKS = {"second": time.perf_counter, "CPU second": time.process_time}


def main(place: str, photos: str, rounds: str = "5") -> None:
    """Print the rates."""
    model, modality, options, device = Embedder(place).load()
    source = open_source(photos, modality)
    batches = [range(first, first + BATCH) for first in range(0, BATCH * BATCHES, BATCH)]
    load, embed = partial(load_batch, source.decode), partial(embed_batch, model, options=options, device=device)
    inputs, _ = load(batches[0])
    passes: dict[str, Callable[[range], object]] = {
        "decoding": load,
        "model": lambda _: embed(inputs),
        "both": lambda batch: embed(load(batch)[0]),
    }
    for run in passes.values():
        run(batches[0])
    rates = {clock: {name: np.empty(int(rounds)) for name in passes} for clock in CLOCKS}
    for number in range(int(rounds)):
        for name, run in passes.items():
            start = {clock: read() for clock, read in CLOCKS.items()}
            for batch in batches:
                run(batch)
            for clock, read in CLOCKS.items():
                rates[clock][name][number] = BATCH * BATCHES / (read() - start[clock])
    for clock, by_name in rates.items():
        for name, measured in by_name.items():
            print(f"{name}: {np.median(measured):.0f} {modality.unit} per {clock}")
        allowed = 1 / (1 / by_name["decoding"] + 1 / by_name["model"])
        print(f"both ÷ what they allow, per {clock}: {np.median(by_name['both'] / allowed):.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
