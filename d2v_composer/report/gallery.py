"""Show queries and the images that they find, as matplotlib figures.

Shapes: N bank images, Q queries, K neighbours.
"""

from collections.abc import Iterator, Sequence

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from d2v_composer.data.labelled_sets import LabelledSet
from d2v_composer.report.style import GREEN, STYLE, VERMILION, WIDTH, name_of

__all__ = ["draw_gallery", "galleries", "gallery"]

QUERIES_A_FIGURE, NEIGHBOURS_SHOWN = 4, 3


def gallery(
    queries: Tensor,
    query_labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    nearest: Tensor,
    class_names: Sequence[str],
) -> Figure:
    """Show queries, one per row, and their nearest bank images, marked as right (tick, green) or wrong (cross, red).

    Args:
        queries: (Q, 3, height, width) uint8.
        query_labels: (Q,).
        bank: (N, 3, height, width) uint8.
        bank_labels: (N,).
        nearest: (Q, K) bank indices, nearest first.
        class_names: The name of each label; the number of a label without one is shown.
    """
    num_queries, num_shown = nearest.shape
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.72 * num_queries))
        grid = figure.subplots(num_queries, num_shown + 1, squeeze=False)
        for row, query, label, indices in zip(grid, queries, query_labels, nearest.long(), strict=True):
            _show(row[0], query, name_of(class_names, label), "k")
            for axes, index in zip(row[1:], indices, strict=True):
                is_right = bool(bank_labels[index] == label)
                mark, colour = ("✓", GREEN) if is_right else ("✗", VERMILION)
                _show(axes, bank[index], f"{mark} {name_of(class_names, bank_labels[index])}", colour, frame=4)
        for column, head in enumerate(["query", *(f"nearest {i}" for i in range(1, num_shown + 1))]):
            grid[0][column].set_title(head, fontsize=10, fontweight="bold")
    return figure


def galleries(labelled: LabelledSet, nearest: Tensor, num_figures: int) -> Iterator[Figure]:
    """Yield galleries of a set: its test images as queries, the same random ones in every run, its train images found.

    Args:
        labelled: Its two splits.
        nearest: (Q, K) bank indices of each query's nearest images, nearest first.
        num_figures: The number of galleries, fewer for a small set.
    """
    bank, queries, class_names = labelled
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(queries.labels), generator=generator)[: num_figures * QUERIES_A_FIGURE]
    for part in chosen.split(QUERIES_A_FIGURE):
        shown = nearest[part, :NEIGHBOURS_SHOWN]
        yield gallery(queries.images[part], queries.labels[part], bank.images, bank.labels, shown, class_names)


def draw_gallery(labelled: LabelledSet, nearest: Tensor) -> NDArray[np.uint8]:
    """Return the first of a set's :func:`galleries` as pixels, (height, width, 3)."""
    canvas = FigureCanvasAgg(next(galleries(labelled, nearest, num_figures=1)))
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def _show(axes: Axes, image: Tensor, text: str, colour: str, frame: float = 0.8) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(text, color=colour, fontsize=10)
    for spine in axes.spines.values():
        spine.set(visible=True, color=colour, linewidth=frame)
