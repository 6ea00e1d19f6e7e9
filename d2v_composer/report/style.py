"""The look of all figures."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["BLUE", "GREEN", "GREY", "HEIGHT", "ORANGE", "STYLE", "VERMILION", "WIDTH", "name_of"]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#8a8f98"
WIDTH, HEIGHT = 6.4, 3.6

STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
}


def name_of(class_names: Sequence[str], label: int | Tensor) -> str:
    """Return the name of a label; ``class N`` if it has none."""
    return class_names[int(label)] if int(label) < len(class_names) else f"class {int(label)}"
