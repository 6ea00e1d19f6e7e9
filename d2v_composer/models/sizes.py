"""Limits for the sizes of a model, and checks of sizes from files."""

from typing import Any

__all__ = [
    "MAX_DEPTH",
    "MAX_PATCHES",
    "MAX_WIDTH",
    "MEAN_RANGE",
    "STD_RANGE",
    "ImageSize",
    "check_channels",
    "check_mlp_ratio",
    "check_whole",
    "height_and_width",
    "is_number",
]

ImageSize = int | tuple[int, int]
"""Pixels a side of a square, or (height, width)."""

# Far above any vision transformer's. Larger ones mean a corrupt file, or one that would exhaust the memory.
MAX_WIDTH = 1 << 16
MAX_DEPTH = 1000
MAX_PATCHES = 1 << 14
# Allowed means and standard deviations of pixels from 0 to 1.
MEAN_RANGE, STD_RANGE = (0.0, 1.0), (1e-3, 1.0)


def check_whole(name: str, value: int, minimum: int, maximum: int) -> None:
    """Check that a size is a whole number within a range.

    Raises:
        ValueError: It is not; the message names the size.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
        raise ValueError(f"{name} must be a whole number from {minimum} to {maximum}, got {value!r}")


def check_mlp_ratio(mlp_ratio: float, embed_dim: int) -> None:
    """Check that a ratio gives a valid number of hidden units.

    Raises:
        ValueError: It does not.
    """
    if not is_number(mlp_ratio, 0, MAX_WIDTH) or not 1 <= mlp_ratio * embed_dim <= MAX_WIDTH:
        raise ValueError(
            f"mlp_ratio must give from 1 to {MAX_WIDTH} hidden units for a width of {embed_dim}, got {mlp_ratio!r}"
        )


def check_channels(name: str, values: Any, in_chans: int, limits: tuple[float, float]) -> None:
    """Check that a size is a number within a range for each channel of an image.

    Raises:
        ValueError: It is not; the message names the size.
    """
    minimum, maximum = limits
    if not isinstance(values, tuple) or len(values) != in_chans:
        raise ValueError(f"{name} must be a number for each of in_chans {in_chans}, got {values!r}")
    if not all(is_number(value, minimum, maximum) for value in values):
        raise ValueError(f"{name} must be numbers from {minimum:g} to {maximum:g}, got {values!r}")


def is_number(value: Any, minimum: float, maximum: float) -> bool:
    """Return whether a value is a number within a range; a bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and minimum <= value <= maximum


def height_and_width(image_size: ImageSize) -> tuple[int, int]:
    """Return (height, width) in pixels."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size
