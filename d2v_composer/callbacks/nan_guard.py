"""Stop a run whose numbers are no longer finite, before they are saved."""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from composer.core import Callback, Event, State
from composer.loggers import Logger
from torch import Tensor
from torch.distributed.tensor import DTensor

from d2v_composer.callbacks.trainer_state import loss_scale, unwrapped
from d2v_composer.system.multi_node import gather_objects

__all__ = ["NanGuard"]

# fairseq's --min-loss-scale: below it every step is skipped.
MIN_LOSS_SCALE = 1e-4
# The loss scaler halves 65536 to 64 in this many skipped batches.
MAX_SKIPPED_BATCHES = 10
ADVICE = "earlier checkpoints are kept: resume from them with a lower optimizer.lr or another precision"


class NanGuard(Callback):
    """Stop training before a checkpoint with numbers that are not finite.

    Composer's NaNMonitor waits for the device; this callback reads the loss that is logged anyway, once a batch.
    Weights and the optimizer's moments are checked before each checkpoint.

    With a loss scaler (amp_fp16) a batch whose loss is not finite is skipped, and the scale halved. Ten such batches in
    a row stop the run.

    Args:
        save_interval: The schedule of checkpoints, as passed to the Trainer.
    """

    def __init__(self, save_interval: Callable[[State, Event], bool]) -> None:
        self.save_interval = save_interval
        self.num_skipped = 0
        self.names: dict[Tensor, str] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        # Later the model may hold gathered copies of sharded weights, which the optimizer does not know.
        self.names |= {weight: name for name, weight in unwrapped(state).named_parameters() if weight.requires_grad}

    def batch_end(self, state: State, logger: Logger) -> None:
        """Check the batch's loss, which is the same on all ranks, and the loss scale.

        Raises:
            FloatingPointError: The loss is not finite, or the loss scale too small.
        """
        batch = int(state.timestamp.batch) - 1
        loss = (state.total_loss_dict or {}).get("loss/train/total", 0.0)
        self.num_skipped = 0 if math.isfinite(loss) else self.num_skipped + 1
        if self.num_skipped > (MAX_SKIPPED_BATCHES - 1 if is_loss_scaled(state) else 0):
            in_a_row = f", {self.num_skipped} batches in a row" if self.num_skipped > 1 else ""
            raise FloatingPointError(f"batch {batch}: the training loss is {loss}{in_a_row}; {ADVICE}")
        scale = loss_scale(state)
        if 0 < scale < MIN_LOSS_SCALE:
            raise FloatingPointError(
                f"batch {batch}: the loss scale fell to {scale:g}: the gradients are not finite, and every step is "
                f"skipped; {ADVICE}"
            )

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self.save_interval(state, Event.BATCH_CHECKPOINT):
            check_weights(state, self.names)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        if self.save_interval(state, Event.EPOCH_CHECKPOINT):
            check_weights(state, self.names)


def is_loss_scaled(state: State) -> bool:
    """Tell whether the Trainer scales the loss; on a GPU it has an enabled scaler in any precision."""
    # Set when a loss is first scaled; GradScaler has no public way to tell.
    return loss_scale(state) > 0 and getattr(state.scaler, "_scale", None) is not None


def check_weights(state: State, names: Mapping[Tensor, str]) -> None:
    """Check the weights and the optimizer's moments, on all ranks.

    Args:
        state: Composer's state.
        names: The name of each of the optimizer's parameters.

    Raises:
        FloatingPointError: A weight or a moment of the optimizer is not finite.
    """
    found = first_not_finite(trained_tensors(state, names))
    if found := next((each for each in gather_objects(found) if each is not None), None):
        raise FloatingPointError(f"batch {int(state.timestamp.batch) - 1}: {found} is not finite; {ADVICE}")


def trained_tensors(state: State, names: Mapping[Tensor, str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the local parts of the optimizer's weights and moments, with their names."""
    for optimizer in state.optimizers:
        for weight in (each for group in optimizer.param_groups for each in group["params"]):
            name = names.get(weight, f"of shape {tuple(weight.shape)}")
            yield f"the weight {name}", local_part(weight.detach())
            for key, value in optimizer.state.get(weight, {}).items():
                if isinstance(value, Tensor):
                    yield f"the optimizer's {key} of {name}", local_part(value)


def first_not_finite(tensors: Iterator[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that is not finite; waits once for each device."""
    verdicts: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors:
        verdicts.setdefault(tensor.device, []).append((name, tensor.isfinite().all()))
    for on_device in verdicts.values():
        are_finite = torch.stack([verdict for _, verdict in on_device]).tolist()
        for (name, _), is_finite in zip(on_device, are_finite, strict=True):
            if not is_finite:
                return name
    return None


def local_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
