"""Seed each batch anew, so that what draws random numbers does so alike after a resume."""

import numpy as np
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from composer.utils.reproducibility import seed_all

__all__ = ["SeededBatches"]


class SeededBatches(Callback):
    """Seed Python, NumPy and torch at the start of each batch, from (seed, batch, rank).

    For algorithms that draw, such as MixUp. When Composer 0.32.1 resumes a StreamingDataset within an epoch, it does
    not restore the states of the generators.

    Args:
        seed: The run's.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def batch_start(self, state: State, logger: Logger) -> None:
        place = (self.seed, int(state.timestamp.batch), dist.get_global_rank())
        seed_all(int(np.random.SeedSequence(place).generate_state(1)[0]))
