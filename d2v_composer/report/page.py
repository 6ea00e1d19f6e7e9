"""Write a run's report as one HTML file, with its plots inside it and as PNG files beside it."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import jinja2
import matplotlib as mpl
import numpy as np
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from d2v_composer.data.labeled import LabeledSet
from d2v_composer.evaluation.evaluate import gap_closed
from d2v_composer.evaluation.metrics import BANKS, HEALTH_STATES
from d2v_composer.report.plots import (
    GREEN,
    STYLE,
    VERMILION,
    WIDTH,
    confusion_plot,
    curves,
    gap_plot,
    name_of,
    probe_plot,
    retrieval_plot,
)
from d2v_composer.report.run import Run, latest, weights_section
from d2v_composer.system.files import write_atomically

DPI = 150
GALLERY_FIGURES, QUERIES_A_FIGURE, NEIGHBORS_SHOWN = 3, 4, 3


class Picture(NamedTuple):
    """A plot as it is written and shown."""

    name: str
    title: str
    png: bytes

    @property
    def data_uri(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


class Tile(NamedTuple):
    """A number at the top of the page."""

    label: str
    value: str
    note: str = ""


def write_report(run: Run, folder: Path) -> list[Path]:
    """Write ``report.html`` and its plots as ``report/*.png`` into a run's folder.

    The plots' names are fixed: ``retrieval_DATASET_bank_{train,test}``, ``gap_closed_DATASET``, ``probes_DATASET``,
    ``confusion_DATASET``, ``gallery_DATASET_{1,2,3}``, ``loss`` and the other curves.

    Returns:
        The written files, the page first.
    """
    sections = {title: pictures for title, pictures in _sections(run) if pictures}
    record = run.record
    page = jinja2.Environment(
        loader=jinja2.PackageLoader("d2v_composer.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("page.html")
    sections_shown = ("config", "versions", "hardware", weights_section(record))
    details = {section.title(): _as_yaml(record[section]) for section in sections_shown}
    html = page.render(
        run_name=record["config"]["run_name"],
        progress=_progress(run),
        warnings=list(_warnings(run)),
        tiles=list(_tiles(run)),
        sections=sections,
        details={"Command": record["command"], **details},
    )
    files = {f"report/{each.name}.png": each.png for pictures in sections.values() for each in pictures}
    (folder / "report").mkdir(exist_ok=True)
    for name, content in {**files, "report.html": html}.items():
        write_atomically(folder / name, content)
    return [folder / name for name in ("report.html", *files)]


def _sections(run: Run) -> Iterator[tuple[str, list[Picture]]]:
    retrieval = [
        _picture(f"retrieval_{name}_bank_{bank}", f"retrieval on {name}", retrieval_plot(run, name, bank))
        for name in run.dataset_names
        for bank in BANKS
    ]
    for name in run.dataset_names:
        if (figure := gap_plot(run, name)) is not None:
            retrieval.append(_picture(f"gap_closed_{name}", f"teacher gap closed on {name}", figure))
    yield "Retrieval", retrieval
    yield "Probes", [_picture(f"probes_{name}", f"probes on {name}", probe_plot(run, name)) for name in run.probed]
    yield "Training", [_picture(*curve) for curve in curves(run)]
    for name in run.looked_up:
        bank, queries, class_names = run.datasets[name]
        nearest = run.neighbors[name]["train"].long()
        confusion = confusion_plot(queries.labels, bank.labels[nearest[:, 0]], class_names)
        shown = enumerate(galleries(run.datasets[name], nearest, GALLERY_FIGURES), 1)
        yield (
            f"Nearest images of the queries of {name} (bank train)",
            [
                _picture(f"confusion_{name}", f"confusion matrix of {name}", confusion),
                *(_picture(f"gallery_{name}_{i}", f"queries of {name} and their nearest images", e) for i, e in shown),
            ],
        )


def _picture(name: str, title: str, figure: Figure) -> Picture:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return Picture(name, title, buffer.getvalue())


def _progress(run: Run) -> str:
    config, hardware = run.record["config"], run.record["hardware"]
    batches = int(run.last("time/batch") or 0)
    device = hardware["gpu"] or hardware["cpu"]
    return f"{batches} batches of {config['max_duration']}, on {hardware['ranks']} × {device}"


def _tiles(run: Run) -> Iterator[Tile]:
    for k in (1, 5):
        if (accuracy := run.last(f"metrics/test/top{k}")) is not None:
            yield Tile(f"top-{k} of the test images", f"{100 * accuracy:.1f} %")
    for name in run.dataset_names:
        k = run.smallest_k
        student = run.accuracies(name, "train", k)
        before, after = student.get(0), latest(student)
        teacher = latest(run.accuracies(name, "train", k, baseline="teacher"))
        assert after is not None  # dataset_names are those with one
        others = {"untrained": before, "teacher": teacher}
        notes = [f"{model} {100 * value:.1f} %" for model, value in others.items() if value is not None]
        yield Tile(f"{name} top-{k}, bank train", f"{100 * after:.1f} %", ", ".join(notes))
        closed = None if before is None or teacher is None else gap_closed(before, after, teacher)
        if closed is not None:
            yield Tile("teacher gap closed", f"{100 * closed:.0f} %", f"{name}, bank train")
    if (loss := run.last("loss/train/total")) is not None:
        yield Tile("training loss", f"{loss:.4f}", "of the last batch")
    if speeds := run.log.get("throughput/images_per_sec"):
        yield Tile("images/s", f"{median(speeds.values()):.0f}", "median")
    if waits := run.log.get("throughput/data_wait"):
        yield Tile("waiting for images", f"{100 * median(waits.values()):.0f} %", "of the time, median")


def _warnings(run: Run) -> Iterator[str]:
    """Yield the states that Health found, and when."""
    for state in HEALTH_STATES:
        batches = [step for step, value in sorted(run.log.get(f"health/{state}", {}).items()) if value]
        if batches:
            when = f"at batch {batches[0]}" if len(batches) == 1 else f"at batches {batches[0]} to {batches[-1]}"
            yield f"{state.replace('_', ' ')} {when} ({len(batches)} measurements)"


def _as_yaml(section: object) -> str:
    return yaml.safe_dump(section, sort_keys=False, allow_unicode=True).rstrip()


@mpl.rc_context(STYLE)
def gallery(labeled: LabeledSet, chosen: Tensor, nearest: Tensor) -> Figure:
    """Show test images, one per row, and their nearest train images, marked as right (tick) or wrong (cross).

    Args:
        labeled: A data set.
        chosen: Indices of the test images, (Q,).
        nearest: Indices of their nearest train images, nearest first, (Q, K).
    """
    bank, queries, class_names = labeled
    figure = Figure(figsize=(WIDTH, 1.72 * len(chosen)))
    grid = figure.subplots(len(chosen), nearest.shape[1] + 1, squeeze=False)
    for row, query, indices in zip(grid, chosen, nearest.long(), strict=True):
        label = queries.labels[query]
        _show(row[0], queries.images[query], name_of(class_names, label), "k")
        for axes, index in zip(row[1:], indices, strict=True):
            mark, color = ("✓", GREEN) if bank.labels[index] == label else ("✗", VERMILION)
            _show(axes, bank.images[index], f"{mark} {name_of(class_names, bank.labels[index])}", color, frame=4)
    for column, head in enumerate(["query", *(f"nearest {i}" for i in range(1, nearest.shape[1] + 1))]):
        grid[0][column].set_title(head, fontsize=10, fontweight="bold")
    return figure


def galleries(labeled: LabeledSet, nearest: Tensor, num_figures: int) -> Iterator[Figure]:
    """Yield galleries of test images, the same random ones in every run, fewer for a small set.

    Args:
        labeled: A data set.
        nearest: Indices of the nearest train images of all test images, nearest first, (Q, K).
        num_figures: The most galleries.
    """
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(nearest), generator=generator)[: num_figures * QUERIES_A_FIGURE]
    for part in chosen.split(QUERIES_A_FIGURE):
        yield gallery(labeled, part, nearest[part, :NEIGHBORS_SHOWN])


def draw_gallery(labeled: LabeledSet, nearest: Tensor) -> NDArray[np.uint8]:
    """Return the first of a set's :func:`galleries` as pixels, (height, width, 3)."""
    canvas = FigureCanvasAgg(next(galleries(labeled, nearest, num_figures=1)))
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def _show(axes: Axes, image: Tensor, text: str, color: str, frame: float = 0.8) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.grid(visible=False)
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(text, color=color, fontsize=10)
    for spine in axes.spines.values():
        spine.set(visible=True, color=color, linewidth=frame)
