"""Plot runs and evaluations as matplotlib figures."""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from d2v_composer.config.choices import OPTIMIZERS
from d2v_composer.evaluation.evaluate import Evaluation
from d2v_composer.evaluation.metrics import METRICS, RETRIEVAL
from d2v_composer.evaluation.metrics.metric import Column
from d2v_composer.evaluation.results import gap_closed_by_step, pivot
from d2v_composer.evaluation.rows import ROWS, STUDENT, TEACHER, UNTRAINED, metric_key
from d2v_composer.models.names import EMBEDDING, RAW_EMBEDDINGS
from d2v_composer.report.run import Run

WIDTH, HEIGHT, DPI = 6.4, 3.9, 150
LABEL_HEIGHT = 0.065  # of the axes
STYLE: dict[Any, Any] = {
    **style.library["tableau-colorblind10"],
    "axes.grid": True,
    "axes.titlelocation": "left",
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
# Metric of labeled test samples → its name.
TESTED = {"top1": "top-1", "top5": "top-5", "map": "average precision", "map_50": "average precision at an IoU of 0.5"}
# File name → title, in which {} stands for the samples' unit; "%" for shares, "log" for a logarithmic axis, or ""; and
# log key → its name in the legend.
CURVES = {
    "accuracy": ("Accuracy on the test {}", "%", {f"metrics/test/{key}": name for key, name in TESTED.items()}),
    "loss": ("Loss", "log", {"loss/train/total": "training", "metrics/test/loss": "test"}),
    "learning_rate": ("Learning rate", "", {kind.log_key: "" for kind in OPTIMIZERS.values()}),
    "gradient_norm": ("Gradient norm before clipping", "log", {"l2_norm/grad/global": ""}),
    "throughput": ("Speed in {}/s", "", {"throughput/samples_per_sec": ""}),
    "data_wait": ("Share of the time spent waiting for {}", "%", {"throughput/data_wait": ""}),
    "variance": (
        "Variance over the {}",
        "",
        {"health/prediction_variance": "student's prediction", "health/target_variance": "teacher's target"},
    ),
}


Line = tuple[Mapping[int, float] | float, dict[str, Any]]
"""Step → value, or the height of a horizontal line; and matplotlib's options for the line."""


def curves(run: Run) -> Iterator[tuple[str, Figure]]:
    """Yield the name and the figure of each plot in ``CURVES`` for which the log has values."""
    for name, (title, scale, labels) in CURVES.items():
        lines = {label: (run.log[key], {}) for key, label in labels.items() if key in run.log}
        if lines:
            yield name, plot(title.format(run.modality.unit), scale, lines)


def accuracy_plots(run: Run) -> Iterator[tuple[str, Figure]]:
    """Yield the name and the figure of each plot that shows accuracies, or the teacher gap closed, on a data set."""
    for dataset in run.retrieval["datasets"]:
        ks, plots = sorted(run.retrieval["ks"]), dict[tuple[str, str], list[Column]]()
        measured = {result.column.key: result.column for result in run.results if result.dataset == dataset}
        for metric in METRICS:
            question = metric.table.question.format(unit=run.modality.unit)
            for column in (measured.get(column.key, column) for column in metric.columns(ks, {})):
                if metric is not RETRIEVAL:
                    plots.setdefault((f"{metric.table.name}_{dataset}", f"{question}\n{dataset}"), []).append(column)
                elif column.k == ks[0]:  # a plot for each bank
                    plots[f"retrieval_{dataset}_bank_{column.bank}", f"{question}\n{dataset}, {column.heading}"] = [
                        column
                    ]
        for (name, title), columns in plots.items():
            if lines := _accuracies(run, dataset, columns):
                yield name, plot(title, "%", lines)
        names = {"": STUDENT, **{name: name for name in (*RAW_EMBEDDINGS, EMBEDDING)}}
        gaps = {text: (gap_closed_by_step(run.log, dataset, name, ks[0]), {}) for name, text in names.items()}
        if lines := {name: line for name, line in gaps.items() if line[0]}:
            yield (
                f"gap_closed_{dataset}",
                gap_plot(
                    f"How much of the teacher gap is closed?\n{dataset}, top-{ks[0]}, "
                    "mean over the banks with a teacher gap above 0",
                    lines,
                ),
            )


def gap_plot(title: str, lines: Mapping[str, Line]) -> Figure:
    """Plot the teacher gap closed, 0 for the untrained student and 1 for the teacher, over the training steps."""
    levels: dict[str, Line] = {TEACHER: (1, {"color": "k"}), UNTRAINED: (0, {"color": "k", "linestyle": ":"})}
    # Where the gap is small, a share may be anything.
    return plot(title, "%", {**lines, **levels}, limits=(-0.3, 1.3))


def _accuracies(run: Run, dataset: str, columns: Sequence[Column]) -> dict[str, Line]:
    lines = {}
    for column, dashes in zip(columns, cycle(["-", "--", ":", "-."])):
        label = f", {column.heading}" if len(columns) > 1 else ""  # else the title says it
        for title, row in ROWS.items():
            values = run.log.get(metric_key(dataset, column, row=title), {})
            if values and row.color:
                shown = values if row.changes_in_training else values[max(values)]
                lines[title + label] = shown, {"color": row.color, "linestyle": dashes}
    return lines


@mpl.rc_context(STYLE)
def quality_over_speed(evaluation: Evaluation, batch_size: int, unit: str) -> Figure:
    """Plot the accuracies of models, with 95 % intervals, over the models' speeds; each data set has a panel."""
    datasets, speeds = [*evaluation.datasets], evaluation.speeds[batch_size]
    figure = Figure(figsize=(8, 5 * len(datasets)))
    for dataset, axes in zip(datasets, figure.subplots(len(datasets), squeeze=False).flat, strict=True):
        best: dict[str, float] = {}
        for column, cells in pivot(evaluation.results, dataset).items():
            if column.k in evaluation.settings.ks[1:]:  # the first says enough
                continue
            names = sorted(cells.keys() & speeds, key=lambda name: speeds[name])
            values, lows, highs = np.array([cells[name].interval for name in names]).T
            places = [speeds[name] for name in names]
            axes.errorbar(places, values, (values - lows, highs - values), label=column.heading, marker="o")
            best |= {name: max(best.get(name, 0), high) for name, high in zip(names, highs, strict=True)}
        for name, height in best.items():  # slanted, as several models may be about as fast
            axes.annotate(name, (speeds[name], height), (0, 4), textcoords="offset points", size=8, rotation=30)
        axes.set(
            title=f"Quality over speed on {dataset}, with 95 % intervals",
            xlabel=f"{unit} per second on this machine, in batches of {batch_size}",
            ylabel="accuracy",
            xscale="log",
        )
        axes.margins(0.15)
        axes.tick_params("x", which="both", labelsize=8)  # labels such as 3 × 10² are long
        axes.yaxis.set_major_formatter(percent)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def percent(share: float, _: object = None) -> str:
    """Return the label of a share on an axis, in %."""
    return f"{round(100 * share, 6) + 0:g} %"  # + 0: no -0


def to_png(figure: Figure) -> bytes:
    """Return a figure as the contents of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


@mpl.rc_context(STYLE)
def plot(title: str, scale: str, lines: Mapping[str, Line], limits: tuple[float, float] | None = None) -> Figure:
    """Plot lines over the training steps."""
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.subplots()
    axes.set(title=title, xlabel="training step")
    ends = list[tuple[float, str, Any]]()
    for label, (values, look) in lines.items():
        if not isinstance(values, Mapping):
            ends.append((values, label, axes.axhline(values, label=label, **look).get_color()))
            continue
        steps = [step for step in sorted(values) if np.isfinite(values[step])]
        numbers, width = [values[step] for step in steps], max(1, len(steps) // 100)
        means = np.convolve(numbers, np.full(width, 1 / width), mode="valid") if numbers else []
        [line] = axes.plot(steps[width - 1 :], means, label=label, marker="." if len(steps) < 50 else "", **look)
        if width > 1:
            axes.plot(steps, numbers, color=line.get_color(), alpha=0.3, linewidth=0.7)
        if numbers:
            ends.append((means[-1], label, line.get_color()))
    if scale == "%":
        axes.yaxis.set_major_formatter(percent)
    elif axes.dataLim.y0 > 0:
        axes.set(yscale="log") if scale == "log" else axes.set_ylim(bottom=0)
    if limits is not None:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, limits[0]), min(high, limits[1]))
    if len(lines) > 1:
        label_ends(axes, ends)
    return figure


def label_ends(axes: Axes, ends: Iterable[tuple[float, str, Any]]) -> None:
    """Write the lines' labels to the right of the axes, beside the ends of the lines."""
    axes.get_ylim()  # matplotlib chooses the limits only when they are asked for
    to_share = axes.transData + axes.transAxes.inverted()
    labels = sorted((to_share.transform((0, height))[1].clip(0, 1), label, color) for height, label, color in ends)
    places = list[float]()
    for share, _, _ in labels:
        places.append(max(share, places[-1] + LABEL_HEIGHT if places else 0))
    highest = 1.0
    for number in reversed(range(len(places))):
        places[number] = min(places[number], highest)
        highest = places[number] - LABEL_HEIGHT
    for (share, label, color), place in zip(labels, places, strict=True):
        arrow = {"arrowstyle": "-", "color": color, "linewidth": 1.5, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)}
        axes.annotate(
            label, (1, share), (1.04, place), xycoords="axes fraction", size="small", va="center", arrowprops=arrow
        )
