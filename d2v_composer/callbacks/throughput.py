"""Log how fast training is, and how much of its time it waits for images."""

import time

from composer.core import Callback, State
from composer.loggers import Logger

__all__ = ["Throughput"]


class Throughput(Callback):
    """Log the speed of training at a fixed interval, without evaluations and checkpoints.

    Composer's SpeedMonitor counts those as training time. Logged, as means over the interval:

    - ``throughput/images_per_sec``: over all ranks;
    - ``throughput/data_wait``: the share of the time, from 0 to 1, in which rank 0 waited for its next images.

    Pass it to the Trainer before callbacks that take time at the end of a batch.

    Args:
        every: Interval in batches.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = every
        self.asked_at = self.got_at = 0.0
        self.images_before = 0
        self.reset()

    def reset(self) -> None:
        """Start a new mean."""
        self.images, self.seconds, self.waited = 0, 0.0, 0.0

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self.asked_at = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self.got_at = time.perf_counter()
        self.images_before = int(state.timestamp.sample)

    def batch_end(self, state: State, logger: Logger) -> None:
        self.images += int(state.timestamp.sample) - self.images_before
        self.seconds += time.perf_counter() - self.asked_at
        self.waited += self.got_at - self.asked_at
        if int(state.timestamp.batch) % self.every == 0:
            logger.log_metrics(
                {
                    "throughput/images_per_sec": self.images / self.seconds,
                    "throughput/data_wait": self.waited / self.seconds,
                }
            )
            self.reset()
