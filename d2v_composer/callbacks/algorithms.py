"""Clip gradients, log their norm, seed the random generators, and give all ranks the same BatchNorm statistics."""

import numpy as np
import torch
from composer import algorithms
from composer.core import Algorithm, Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist
from composer.utils.reproducibility import seed_all
from torch import Tensor


def trained(state: State) -> list[Tensor]:
    """Return the parameters that the optimizers train."""
    return [tensor for optimizer in state.optimizers for group in optimizer.param_groups for tensor in group["params"]]


class GradientClipping(algorithms.GradientClipping):
    """Clip the global norm of the trained parameters' gradient.

    Args:
        clipping_threshold: Largest allowed norm; a gradient with a larger norm is scaled down to this norm.
    """

    def __init__(self, clipping_threshold: float) -> None:
        super().__init__("norm", clipping_threshold)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        torch.nn.utils.clip_grad_norm_(trained(state), self.clipping_threshold)


class GradientNorm(Algorithm):
    """Log the norm of the gradient before clipping, as ``l2_norm/grad/global``.

    In the Trainer's list of algorithms, GradientNorm must come after GradientClipping.

    Args:
        every: Interval in batches.

    Example:
        >>> from composer.algorithms import GradientClipping
        >>> from d2v_composer.callbacks import GradientNorm
        >>> algorithms = [GradientClipping("norm", 2.0), GradientNorm(every=100)]  # Trainer(algorithms=algorithms)
    """

    def __init__(self, every: int = 10) -> None:
        self.every = every

    def match(self, event: Event, state: State) -> bool:
        # Composer runs the algorithms of an AFTER event from last to first.
        return event == Event.AFTER_TRAIN_BATCH and int(state.timestamp.batch) % self.every == 0

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        gradients = [tensor.grad for tensor in trained(state) if tensor.grad is not None]
        logger.log_metrics({"l2_norm/grad/global": torch.nn.utils.get_total_norm(gradients).item()})


class SeededBatches(Callback):
    """Seed Python, NumPy and torch before each batch, with a hash of the run's seed, the batch's index and the rank.

    Args:
        seed: Seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def batch_start(self, state: State, logger: Logger) -> None:
        # Composer 0.32.1 does not restore the generators when it resumes a StreamingDataset within an epoch.
        place = (self.seed, int(state.timestamp.batch), dist.get_global_rank())
        seed_all(int(np.random.SeedSequence(place).generate_state(1)[0]))


def broadcast_statistics(model: torch.nn.Module) -> None:
    """Give all ranks the BatchNorm statistics of rank 0."""
    for name, buffer in model.named_buffers():
        if "running_" in name:
            dist.broadcast(buffer, 0)
