"""Composer's EMA for any number of ranks, the gradient's norm before clipping, and a seed for each batch."""

from typing import Any

import numpy as np
import torch
from composer.algorithms import EMA as ComposerEMA  # noqa: N811 (the class below takes its name)
from composer.core import Algorithm, Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist
from composer.utils.reproducibility import seed_all
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

DDP_PREFIX = "module."


class EMA(ComposerEMA):
    """Composer's EMA, whose state has the model's own names.

    Composer's has DDP's names on several ranks, and silently skips names that it does not know: a run that resumes on
    another number of ranks would resume from the averaged weights and stop averaging. Checkpoints name the class.
    """

    def match(self, event: Event, state: State) -> bool:
        if event in self.move_device_events:  # the first ones after a checkpoint was loaded
            self._rename(DDP_PREFIX if isinstance(state.model, DistributedDataParallel) else "")
        return super().match(event, state)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["ema_model"] = {kind: renamed(tensors, "") for kind, tensors in state["ema_model"].items()}
        return state

    def _rename(self, prefix: str) -> None:
        average = self.ema_model
        if average is not None:
            average.named_parameters_dict = renamed(average.named_parameters_dict, prefix)
            average.named_buffers_dict = renamed(average.named_buffers_dict, prefix)


def renamed(tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + name.removeprefix(DDP_PREFIX): tensor for name, tensor in tensors.items()}


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


class SeededBatches(Callback):
    """Seed Python, NumPy and torch at the start of each batch, from (seed, batch, rank).

    For algorithms that draw, such as MixUp. When Composer 0.32.1 resumes a StreamingDataset within an epoch, it does
    not restore the states of the generators.

    Args:
        seed: Seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def batch_start(self, state: State, logger: Logger) -> None:
        place = (self.seed, int(state.timestamp.batch), dist.get_global_rank())
        seed_all(int(np.random.SeedSequence(place).generate_state(1)[0]))
