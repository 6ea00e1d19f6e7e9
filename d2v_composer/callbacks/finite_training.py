"""A run that has come to NaN ends, and none of it is saved."""

import math
from collections.abc import Callable, Iterator

from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from d2v_composer.callbacks.health import loss_scale

__all__ = ["FiniteTraining"]

# fairseq's --min-loss-scale: below it, nothing is learned any more, for each step is skipped.
MIN_LOSS_SCALE = 1e-4
ADVICE = "what was saved before is kept: go on from there with a lower optimizer.lr or another precision"


class FiniteTraining(Callback):
    """End training before a checkpoint of numbers that are not finite.

    Unlike Composer's NaNMonitor it waits for nothing: the loss is the number that is logged anyway, once a batch. What
    the optimizer itself made infinite is seen when it is to be saved.

    Args:
        save_interval: When a checkpoint is due, as the Trainer takes it.
    """

    def __init__(self, save_interval: Callable[[State, Event], bool]) -> None:
        self.save_interval = save_interval

    def batch_end(self, state: State, logger: Logger) -> None:
        """Look at the batch's loss, which is the same on all ranks, and at the loss scaler.

        Raises:
            FloatingPointError: The loss is infinite or not a number, or the scaler has come to its floor.
        """
        batch = int(state.timestamp.batch) - 1
        loss = (state.total_loss_dict or {}).get("loss/train/total", 0.0)
        if not math.isfinite(loss):
            raise FloatingPointError(f"batch {batch}: the training loss is {loss}; {ADVICE}")
        scale = loss_scale(state)
        if 0 < scale < MIN_LOSS_SCALE:
            raise FloatingPointError(
                f"batch {batch}: the loss scaler is down at {scale:g}, for the gradients are not finite: every step is "
                f"skipped; {ADVICE}"
            )

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """As :meth:`check_weights`, where a checkpoint is due."""
        if self.save_interval(state, Event.BATCH_CHECKPOINT):
            check_weights(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """As :meth:`check_weights`, where a checkpoint is due."""
        if self.save_interval(state, Event.EPOCH_CHECKPOINT):
            check_weights(state)


def check_weights(state: State) -> None:
    """Look at all that training changes, on all ranks.

    Raises:
        FloatingPointError: A weight or a moment of the optimizer is not finite.
    """
    found = next((name for name, tensor in trained_tensors(state) if not tensor.isfinite().all()), None)
    if found := next((each for each in dist.all_gather_object(found) if each is not None), None):
        raise FloatingPointError(f"batch {int(state.timestamp.batch) - 1}: {found} is not finite; {ADVICE}")


def trained_tensors(state: State) -> Iterator[tuple[str, Tensor]]:
    """What this rank has of the trained weights and of the optimizer's moments, with their names."""
    for name, weight in state.model.named_parameters():
        if weight.requires_grad:
            yield f"the weight {name}", local_part(weight.detach())
            for optimizer in state.optimizers:
                for key, value in optimizer.state.get(weight, {}).items():
                    if isinstance(value, Tensor):
                        yield f"the optimizer's {key} of {name}", local_part(value)


def local_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
