"""Largest sizes of a model, and checks of the numbers that a file claims."""

from typing import Any

__all__ = ["MAX_DEPTH", "MAX_PATCHES", "MAX_WIDTH", "check_mlp_ratio", "check_whole", "is_number"]

# Far beyond any vision transformer; a file that says more is damaged, or wants memory that nobody has.
MAX_WIDTH = 1 << 16
MAX_DEPTH = 1000
MAX_PATCHES = 1 << 14


def check_whole(name: str, value: int, minimum: int, maximum: int) -> None:
    """Refuse what is no whole number of the range; files bring such sizes.

    Raises:
        ValueError: It names the size.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
        raise ValueError(f"{name} must be a whole number from {minimum} to {maximum}, got {value!r}")


def check_mlp_ratio(mlp_ratio: float, embed_dim: int) -> None:
    """Refuse a ratio that leaves no hidden unit, or too many.

    Raises:
        ValueError: It says what is allowed.
    """
    if not is_number(mlp_ratio, 0, MAX_WIDTH) or not 1 <= mlp_ratio * embed_dim <= MAX_WIDTH:
        raise ValueError(
            f"mlp_ratio must give from 1 to {MAX_WIDTH} hidden units for a width of {embed_dim}, got {mlp_ratio!r}"
        )


def is_number(value: Any, minimum: float, maximum: float) -> bool:
    """Whether a value is a number of the range, and no bool, which Python takes for one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and minimum <= value <= maximum
