"""A run that has come to NaN ends."""

import math

from composer.core import Callback, State
from composer.loggers import Logger

__all__ = ["FiniteLoss"]


class FiniteLoss(Callback):
    """End training before the checkpoint of a batch whose loss is not finite.

    Unlike Composer's NaNMonitor it waits for nothing: it looks at the number that is logged anyway, once a batch.
    """

    def batch_end(self, state: State, logger: Logger) -> None:
        """Look at the batch's loss, which is the same on all ranks.

        Raises:
            FloatingPointError: It is infinite or not a number.
        """
        loss = (state.total_loss_dict or {}).get("loss/train/total", 0.0)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"batch {int(state.timestamp.batch) - 1}: the training loss is {loss}; what was saved before is kept: "
                "go on from there with a lower optimizer.lr or another precision"
            )
