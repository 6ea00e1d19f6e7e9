"""Plot a run, as matplotlib figures.

Shapes: N bank images, Q queries, K neighbors, C classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, product
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter, StrMethodFormatter
from numpy.typing import NDArray
from torch import Tensor

from d2v_composer.evaluation.evaluate import confusion_matrix, gap_closed_by_step
from d2v_composer.evaluation.metrics import EMBEDDINGS
from d2v_composer.report.run import Run, latest
from d2v_composer.report.tables import PROBE_HEADS

# Okabe and Ito's palette, which color-blind readers can tell apart.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#8a8f98"
WIDTH, HEIGHT = 6.4, 3.6
EMBEDDING_STYLES = dict(zip(EMBEDDINGS, product(["-", "--"], [BLUE, ORANGE, GREEN]), strict=True))
BASELINE_COLORS = {"teacher": VERMILION, "encoder": GREEN, "pixels": GREY}

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


class Curve(NamedTuple):
    """A plot over the steps of a run."""

    title: str
    unit: str
    lines: Mapping[str, str]
    """Key in the log → label; a key may end in '*'."""
    scale: str = "linear"


# File name → plot.
CURVES = {
    "accuracy": Curve("Accuracy on the test images", "%", {"metrics/test/top1": "top-1", "metrics/test/top5": "top-5"}),
    "loss": Curve("Loss", "", {"loss/train/total": "training", "metrics/test/loss": "test images"}, scale="log"),
    "learning_rate": Curve("Learning rate", "", {"lr-AdamW/group0": "learning rate"}),
    "gradient_norm": Curve("Gradient norm before clipping", "", {"l2_norm/grad/global": "gradient norm"}, scale="log"),
    "throughput": Curve("Throughput", "images/s", {"throughput/images_per_sec": "images/s"}),
    "data_wait": Curve("Waiting for images", "% of the time", {"throughput/data_wait": "data wait"}),
    "cosines": Curve(
        "Cosine of prediction and target", "", {"health/cosine/cls": "CLS", "health/cosine/patch": "patches"}
    ),
    "layers": Curve("Cosine of prediction and each teacher layer", "", {"health/cosine/layer_*": "layer"}),
    "variance": Curve(
        "Variance over the images",
        "",
        {"health/prediction_variance": "prediction", "health/target_variance": "target"},
    ),
    "effective_rank": Curve("Effective rank of the predictions", "", {"health/effective_rank": "effective rank"}),
}


def curves(run: Run) -> Iterator[tuple[str, str, Figure]]:
    """Yield file name, title and figure of every plot over steps that the log has values for."""
    for name, curve in CURVES.items():
        lines = {label: run.log[key] for wanted in curve.lines.items() for key, label in _matching(run.log, *wanted)}
        if lines:
            yield name, curve.title, _curve_plot(curve, lines)


def _matching(log: Mapping[str, object], key: str, label: str) -> list[tuple[str, str]]:
    """Return the log's keys that match a key, each with its label."""
    prefix = key.removesuffix("*")
    if prefix == key:
        return [(key, label)] if key in log else []
    numbers = sorted(int(each.removeprefix(prefix)) for each in log if each.startswith(prefix))
    return [(f"{prefix}{number}", f"{label} {number}") for number in numbers]


@mpl.rc_context(STYLE)
def _curve_plot(curve: Curve, lines: Mapping[str, Mapping[int, float]]) -> Figure:
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.subplots()
    colors = [BLUE, ORANGE] if len(lines) <= 2 else mpl.colormaps["viridis"](np.linspace(0, 0.9, len(lines)))
    for (label, values), color in zip(lines.items(), colors, strict=False):
        steps, numbers = _arrays(values)
        numbers = 100 * numbers if curve.unit.startswith("%") else numbers
        axes.plot(steps, numbers, color=color, alpha=0.3, linewidth=0.7)
        axes.plot(steps, running_mean(numbers, max(1, len(numbers) // 100)), color=color, label=label)
    positive = all(number > 0 for values in lines.values() for number in values.values())
    if curve.scale == "log" and positive:
        axes.set_yscale("log")
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    if curve.scale == "linear" and positive:
        axes.set_ylim(bottom=0)
    if len(lines) > 1:
        axes.legend(ncols=1 if len(lines) <= 6 else 2, fontsize=9)
    _label(axes, curve.title, curve.unit)
    return figure


def _arrays(values: Mapping[int, float]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    steps = sorted(values)
    return np.array(steps), np.array([values[step] for step in steps], dtype=float)


def running_mean(numbers: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Return the mean of each value and the up to ``width`` - 1 before it, without the NaN among them."""
    finite = np.isfinite(numbers)
    sums, counts = (np.concatenate([[0], np.cumsum(each)]) for each in (np.where(finite, numbers, 0), finite))
    last = np.arange(1, len(numbers) + 1)
    first = np.maximum(0, last - width)
    with np.errstate(invalid="ignore"):
        return (sums[last] - sums[first]) / (counts[last] - counts[first])


def _label(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axes.set_xlabel("batch")
    axes.set_ylabel(unit)


def retrieval_plot(run: Run, dataset: str, bank: str) -> Figure:
    """Plot accuracy over the steps, with the baselines as horizontal lines: a color per model, a line style per k."""
    measures = {k: f"top-{k}" for k in sorted(run.record["config"]["retrieval"]["ks"])}
    return _accuracy_plot(run, dataset, bank, measures, f"{dataset}, bank {bank}")


def probe_plot(run: Run, dataset: str) -> Figure:
    """Plot the accuracy of each probe over the steps, as :func:`retrieval_plot` does."""
    return _accuracy_plot(run, dataset, "train", PROBE_HEADS, f"{dataset}, probes fitted to train, judged on test")


@mpl.rc_context(STYLE)
def _accuracy_plot(run: Run, dataset: str, bank: str, measures: Mapping[Any, str], title: str) -> Figure:
    figure = Figure(figsize=(WIDTH, 1.2 * HEIGHT))
    axes = figure.subplots()
    logged = {label: measure for measure, label in measures.items() if run.accuracies(dataset, bank, measure)}
    for (label, measure), style in zip(logged.items(), cycle(["-", "--", ":", "-."])):
        steps, numbers = _arrays(run.accuracies(dataset, bank, measure))
        axes.plot(steps, numbers, style, color=BLUE, marker="o", markersize=4, label=f"student, {label}")
        for baseline, color in BASELINE_COLORS.items():
            if (value := latest(run.accuracies(dataset, bank, measure, baseline))) is not None:
                axes.axhline(value, color=color, linestyle=style, linewidth=1.2, label=f"{baseline}, {label}")
    _finish_shares(axes, title)
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
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.subplots()
    for name, values in closed.items():
        style, color = EMBEDDING_STYLES[name]
        if values:
            axes.plot(*_arrays(values), style, color=color, marker="o", markersize=4, label=name)
    axes.axhline(1, color=GREY, linewidth=1)
    # Where the gap is small, its parts are large and say little.
    axes.set_ylim(max(axes.get_ylim()[0], -0.3), min(axes.get_ylim()[1], 1.3))
    _finish_shares(axes, f"Teacher gap closed on {dataset}, top-{run.smallest_k}")
    return figure


def _finish_shares(axes: Axes, title: str) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _label(axes, title, "")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)


@mpl.rc_context({**STYLE, "axes.grid": False})
def confusion_plot(labels: Tensor, found: Tensor, class_names: Sequence[str]) -> Figure:
    """Plot how often queries of a class find each class, in % of the class's queries.

    Args:
        labels: Labels of the queries, (Q,) int64.
        found: Labels of their nearest images, (Q,) int64.
        class_names: The name of each label; a label without one is shown as its number.
    """
    counts = confusion_matrix(labels, found, len(class_names)).astype(float)
    with np.errstate(invalid="ignore"):
        shares = 100 * counts / counts.sum(axis=1, keepdims=True)
    figure = Figure(figsize=(WIDTH, WIDTH))
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0)
    figure.colorbar(image, ax=axes, shrink=0.75, format="%d %%")
    if len(shares) <= 20:
        names = [name_of(class_names, label) for label in range(len(shares))]
        axes.set_xticks(range(len(shares)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(shares)), names)
        for (i, j), share in np.ndenumerate(shares):
            if np.isfinite(share):
                dark = share > 0.6 * np.nanmax(shares)
                axes.text(j, i, f"{share:.0f}", ha="center", va="center", fontsize=8, color="w" if dark else "k")
    axes.set_title("Class of the nearest image", loc="left", fontweight="bold", fontsize=11)
    axes.set_ylabel("class of the query")
    return figure
