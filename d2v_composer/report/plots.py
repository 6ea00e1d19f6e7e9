"""Plot a run, as matplotlib figures.

Shapes: N bank images, Q queries, K neighbors, C classes.
"""

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from d2v_composer.evaluation.evaluate import class_name, confusion_matrix, gap_closed_by_step
from d2v_composer.report.run import EMBEDDINGS, Run, latest
from d2v_composer.report.tables import PROBE_HEADS

# Okabe and Ito's palette, which color-blind readers can tell apart.
BLUE, ORANGE, GREEN, VERMILION, PINK, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#8a8f98"
WIDTH, HEIGHT = 6.4, 3.9
MODEL_COLORS = {"student": BLUE, "teacher": VERMILION, "encoder": GREEN, "pixels": GREY}
STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, VERMILION, PINK, GREY]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
# File name → title and the log's keys.
CURVES = {
    "accuracy": ("Accuracy on the test images", "metrics/test/top*"),
    "loss": ("Loss", "loss/train/total", "metrics/test/loss"),
    "learning_rate": ("Learning rate", "lr-AdamW/group0"),
    "gradient_norm": ("Gradient norm before clipping", "l2_norm/grad/global"),
    "throughput": ("Throughput in images/s", "throughput/images_per_sec"),
    "data_wait": ("Part of the time spent waiting for images", "throughput/data_wait"),
    "cosines": ("Cosine of prediction and target", "health/cosine/cls", "health/cosine/patch"),
    "layers": ("Cosine of prediction and each teacher layer", "health/cosine/layer_*"),
    "variance": ("Variance over the images", "health/*_variance"),
    "effective_rank": ("Effective rank of the predictions", "health/effective_rank"),
}
LOG_SCALE, SHARES = ("loss", "gradient_norm"), ("accuracy", "data_wait")


def curves(run: Run) -> Iterator[tuple[str, Figure]]:
    """Yield file name and figure of every plot over steps that the log has values for."""
    for name, (title, *keys) in CURVES.items():
        lines = {key: run.log[key] for wanted in keys for key in fnmatch.filter(run.log, wanted)}
        if lines:
            yield name, _curve_plot(name, title, lines)


@mpl.rc_context(STYLE)
def _curve_plot(name: str, title: str, lines: Mapping[str, Mapping[int, float]]) -> Figure:
    figure, axes = _plot_over_batches(title)
    if len(lines) > 6:
        axes.set_prop_cycle(color=mpl.colormaps["viridis"](np.linspace(0, 0.9, len(lines))))
    for label, values in lines.items():
        finite = {step: values[step] for step in sorted(values) if np.isfinite(values[step])}
        steps, numbers = list(finite), list(finite.values())
        [line] = axes.plot(steps, numbers, alpha=0.3, linewidth=0.7)
        width = max(1, len(numbers) // 100)  # of the running mean
        means = np.convolve(numbers, np.ones(width) / width, mode="valid") if numbers else []
        axes.plot(steps[width - 1 :], means, color=line.get_color(), label=label)
    if all(number > 0 for values in lines.values() for number in values.values()):
        if name in LOG_SCALE:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
    if name in SHARES:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    if len(lines) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _plot_over_batches(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.subplots()
    axes.set(title=title, xlabel="batch")
    return figure, axes


def retrieval_plot(run: Run, dataset: str, bank: str) -> Figure:
    """Plot accuracy over the steps, with the baselines as horizontal lines: a color per model, a line style per k."""
    measures = {k: f"top-{k}" for k in sorted(run.record["config"]["retrieval"]["ks"])}
    return _accuracy_plot(run, dataset, bank, measures, f"{dataset}, bank {bank}")


def probe_plot(run: Run, dataset: str) -> Figure:
    """Plot the accuracy of each probe over the steps, as :func:`retrieval_plot` does."""
    return _accuracy_plot(run, dataset, "train", PROBE_HEADS, f"{dataset}, probes fitted to train, judged on test")


@mpl.rc_context(STYLE)
def _accuracy_plot(run: Run, dataset: str, bank: str, measures: Mapping[Any, str], title: str) -> Figure:
    figure, axes = _plot_over_batches(title)
    for (measure, label), style in zip(measures.items(), cycle(["-", "--", ":", "-."])):
        for model, color in MODEL_COLORS.items():
            values = run.accuracies(dataset, bank, measure, None if model == "student" else model)
            look: dict[str, Any] = {"color": color, "linestyle": style, "label": f"{model}, {label}"}
            if model == "student" and values:
                axes.plot(sorted(values), [values[step] for step in sorted(values)], marker=".", **look)
            elif (value := latest(values)) is not None:
                axes.axhline(value, **look)
    _finish_shares(axes)
    return figure


@mpl.rc_context(STYLE)
def gap_plot(run: Run, dataset: str) -> Figure | None:
    """Plot the teacher gap closed in each embedding over the steps.

    Returns:
        ``None`` if the log lacks the untrained student or the teacher.
    """
    closed = {name: gap_closed_by_step(run.log, dataset, name, run.smallest_k) for name in EMBEDDINGS}
    if not any(closed.values()):
        return None
    figure, axes = _plot_over_batches(f"Teacher gap closed on {dataset}, top-{run.smallest_k}")
    for name, values in closed.items():
        if values:
            axes.plot([*values], [*values.values()], marker=".", label=name)
    axes.axhline(1, color="k", linewidth=1)
    axes.set_ylim(-0.3, 1.3)  # where the gap is small, its parts are large and say little
    _finish_shares(axes)
    return figure


def _finish_shares(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


@mpl.rc_context({**STYLE, "axes.grid": False})
def confusion_plot(labels: Tensor, found: Tensor, class_names: Sequence[str]) -> Figure:
    """Plot how often queries of a class find each class, in % of the class's queries.

    Args:
        labels: Labels of the queries, (Q,) int64.
        found: Labels of their nearest images, (Q,) int64.
        class_names: The name of each label; a label without one is shown as its number.
    """
    counts = confusion_matrix(labels, found, len(class_names))
    shares = 100 * counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    figure = Figure(figsize=(WIDTH, WIDTH))
    axes = figure.subplots()
    figure.colorbar(axes.imshow(shares, cmap="Blues", vmin=0), ax=axes, shrink=0.75, format="%d %%")
    if len(shares) <= 20:
        names = [class_name(class_names, label) for label in range(len(shares))]
        axes.set_xticks(range(len(shares)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(shares)), names)
        for (i, j), share in np.ndenumerate(shares):
            color = "w" if share > 0.6 * shares.max() else "k"
            axes.text(j, i, f"{share:.0f}", ha="center", va="center", fontsize=8, color=color)
    axes.set(title="Class of the nearest image", ylabel="class of the query")
    return figure
