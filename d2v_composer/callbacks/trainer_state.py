"""Read the state of Composer's Trainer: the model itself, the loss scale, what is due."""

from collections.abc import Callable, Set
from typing import Any

import torch
from composer.core import Event, State, Time
from composer.utils import create_interval_scheduler
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["due_every", "loss_scale", "unwrapped"]

WRAPPERS = (DataParallel, DistributedDataParallel, FullyShardedDataParallel, OptimizedModule)


def due_every(interval: str, final_events: Set[Event] = frozenset()) -> Callable[[State, Event], bool]:
    """Whether something is due at the end of a batch or an epoch.

    Args:
        interval: Composer time string.
        final_events: At which of the run's last events it is due in any case.

    Raises:
        ValueError: It is no duration, or not a positive one, with which Composer would never call.
    """
    if not isinstance(interval, str) or not interval.strip() or Time.from_timestring(interval).value <= 0:
        raise ValueError(f"interval must be a positive duration such as '100ba', got {interval!r}")
    return create_interval_scheduler(interval, checkpoint_events=False, final_events=set(final_events))


def loss_scale(state: State) -> float:
    """What the loss is multiplied with before the backward pass; 0 where it is not."""
    return float(state.scaler.get_scale()) if state.scaler is not None and state.scaler.is_enabled() else 0.0


def unwrapped(state: State) -> torch.nn.Module:
    """The model itself, without the wrappers of DDP, FSDP and torch.compile, which forward ``forward`` alone."""
    model: Any = state.model
    while isinstance(model, WRAPPERS):
        model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    return model
