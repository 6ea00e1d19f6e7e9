"""When a callback's turn is."""

from collections.abc import Callable, Set

from composer.core import Event, State, Time
from composer.utils import create_interval_scheduler

__all__ = ["due_every"]


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
