"""Limits of a config's fields, and the one checker that walks the dataclasses."""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import field, fields, is_dataclass
from typing import Any

__all__ = ["SMALLEST_FLOAT", "duration", "find_wrong_values", "limited", "must", "suggest"]

# Also the largest seed: ranks and epochs add to it, and numpy's seeds end at 2^32.
LARGEST_INT = (1 << 31) - 1
# float32 ends at 1e-38 and 3e38.
SMALLEST_FLOAT, LARGEST_FLOAT = 1e-30, 1e30

Check = Callable[[Any], object]


def limited(default: Any, least: float | None = None, most: float | None = None, check: Check | None = None) -> Any:
    """Return a dataclass field with a default and limits.

    Args:
        default: Copied for each config.
        least: Of the number, or of each number in a list.
        most: Likewise.
        check: Raises ValueError if the value is not allowed.
    """
    return field(default_factory=lambda: copy(default), metadata={"least": least, "most": most, "check": check})


def find_wrong_values(section: Any, prefix: str = "") -> Iterator[str]:
    """Yield a line for each field, nested sections included, whose value is outside its limits."""
    for each in fields(section):
        key, value = prefix + each.name, getattr(section, each.name)
        try:
            if value is not None:
                _test(value, **each.metadata)
        except ValueError as error:
            yield f"{key}: {error}"
        inner = {f"{key}.{name}": it for name, it in value.items()} if isinstance(value, Mapping) else {key: value}
        for name, it in inner.items():
            if is_dataclass(it):
                yield from find_wrong_values(it, f"{name}.")


def _test(value: Any, least: float | None = None, most: float | None = None, check: Check | None = None) -> None:
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int | float) and not isinstance(number, bool):
            largest = LARGEST_INT if isinstance(number, int) else LARGEST_FLOAT
            smallest, largest = -largest if least is None else least, largest if most is None else most
            if not math.isfinite(number):
                raise ValueError(f"must be finite, got {value}")
            if number < smallest:
                raise ValueError(f"must be at least {smallest}, got {value}")
            if number > largest:
                raise ValueError(f"must be at most {largest}, got {value}")
    if check is not None:
        check(value)


def must(rule: str, holds: Callable[[Any], bool]) -> Check:
    """Return a check of one rule: 'be …' or 'have …'."""

    def check(value: Any) -> None:
        if not holds(value):
            raise ValueError(f"must {rule}, got {value!r}")

    return check


def duration(*units: str, least: int = 1) -> Check:
    """Return a check of Composer time strings: 'ba' batches, 'ep' epochs, 'dur' a share of the run."""
    example = " or ".join("'0.1dur'" if unit == "dur" else f"'5{unit}'" for unit in units)

    def check(text: str) -> None:
        from composer.core import Time, TimeUnit  # takes seconds, and only a training has durations

        try:
            time = Time.from_timestring(text)
        except (TypeError, ValueError):
            time = None
        if time is None or time.unit.value not in units:
            raise ValueError(f"must be a duration such as {example}, got {text!r}")
        if time.unit == TimeUnit.DURATION:
            if not 0 <= time.value <= 1:
                raise ValueError(f"must be from 0dur to 1dur, got {text!r}")
        elif time.value < least:
            raise ValueError(f"must be positive, got {text!r}")

    return check


def suggest(name: str, allowed: Sequence[str]) -> str:
    """Return the hint that follows an unknown name: the nearest one, and all that are allowed."""
    nearest = difflib.get_close_matches(name, allowed, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"{hint} (allowed: {', '.join(allowed)})" if allowed else hint
