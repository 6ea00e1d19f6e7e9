"""Composer's moving average of the weights, in checkpoints that any number of ranks resumes."""

from typing import Any

from composer.algorithms import EMA as ComposerEMA  # noqa: N811 (the class below takes its name)
from composer.core import Event, State
from torch.nn.parallel import DistributedDataParallel

__all__ = ["EMA"]

DDP_PREFIX = "module."


class EMA(ComposerEMA):
    """Composer's EMA, whose state has the model's own names.

    Composer's has DDP's names on several ranks, and skips names that it does not know: a run that resumed on another
    number of ranks would train on from the average, and average no more. The class keeps its name, which checkpoints
    have.
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
