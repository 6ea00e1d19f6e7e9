"""Read the state of Composer's Trainer."""

from collections.abc import Callable, Set
from typing import Any, TypeVar

import torch
from composer.core import Callback, Event, State, Time
from composer.utils import create_interval_scheduler
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

WRAPPERS = (DistributedDataParallel, OptimizedModule)

CallbackT = TypeVar("CallbackT", bound=Callback)


def find_callback(state: State, kind: type[CallbackT]) -> CallbackT | None:
    """Return the run's first callback of the given class; ``None`` if there is none."""
    return next((callback for callback in state.callbacks if isinstance(callback, kind)), None)


def has_ended(state: State) -> bool:
    """Return True if the run has reached its maximum duration."""
    return state.max_duration is not None and state.timestamp >= state.max_duration


def due_every(interval: str, final_events: Set[Event] = frozenset()) -> Callable[[State, Event], bool]:
    """Return a function that, given the state and an event, returns True at the end of each interval."""
    if not isinstance(interval, str) or Time.from_timestring(interval).value <= 0:
        raise ValueError(f"interval must be a positive duration such as '100ba', got {interval!r}")
    return create_interval_scheduler(interval, checkpoint_events=False, final_events=set(final_events))


def loss_scale(state: State) -> float:
    """Return the scale of the Trainer's gradient scaler; 0 without an enabled scaler."""
    return float(state.scaler.get_scale()) if state.scaler is not None and state.scaler.is_enabled() else 0.0


def unwrapped(state: State) -> torch.nn.Module:
    """Return the model without the wrappers of DDP and torch.compile."""
    model: Any = state.model
    while isinstance(model, WRAPPERS):
        model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    return model
