"""Log the norm of the gradient before it is clipped."""

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch.distributed.tensor import DTensor

__all__ = ["GradientNorm"]


class GradientNorm(Algorithm):
    """Log ``l2_norm/grad/global``, the key of Composer's OptimizerMonitor, at a fixed interval.

    It changes nothing. It is an algorithm because callbacks run after all algorithms, when the gradient is clipped.
    Pass it to the Trainer after GradientClipping: Composer runs the algorithms of an AFTER event from last to first.

    Args:
        every: Interval in batches.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = every

    def match(self, event: Event, state: State) -> bool:
        return event == Event.AFTER_TRAIN_BATCH and int(state.timestamp.batch) % self.every == 0

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        gradients = [each.grad for each in state.model.parameters() if each.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        logger.log_metrics({"l2_norm/grad/global": (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()})
