"""Write a run's report as one HTML file, with its plots inside it and as PNG files beside it."""

import base64
import io
from collections.abc import Iterator, Sequence
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
    name_of,
    probe_plot,
    retrieval_plot,
    share_plot,
)
from d2v_composer.report.run import Run, latest, weights_section
from d2v_composer.system.files import write_atomically

# MERGED FROM d2v_composer/report/page.py: Show queries and the images that they find, as matplotlib figures.

QUERIES_A_FIGURE, NEIGHBORS_SHOWN = 4, 3


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
                mark, color = ("✓", GREEN) if is_right else ("✗", VERMILION)
                _show(axes, bank[index], f"{mark} {name_of(class_names, bank_labels[index])}", color, frame=4)
        for column, head in enumerate(["query", *(f"nearest {i}" for i in range(1, num_shown + 1))]):
            grid[0][column].set_title(head, fontsize=10, fontweight="bold")
    return figure


def galleries(labeled: LabeledSet, nearest: Tensor, num_figures: int) -> Iterator[Figure]:
    """Yield galleries of a set: its test images as queries, the same random ones in every run, its train images found.

    Args:
        labeled: Its two splits.
        nearest: (Q, K) bank indices of each query's nearest images, nearest first.
        num_figures: The number of galleries, fewer for a small set.
    """
    bank, queries, class_names = labeled
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(queries.labels), generator=generator)[: num_figures * QUERIES_A_FIGURE]
    for part in chosen.split(QUERIES_A_FIGURE):
        shown = nearest[part, :NEIGHBORS_SHOWN]
        yield gallery(queries.images[part], queries.labels[part], bank.images, bank.labels, shown, class_names)


def draw_gallery(labeled: LabeledSet, nearest: Tensor) -> NDArray[np.uint8]:
    """Return the first of a set's :func:`galleries` as pixels, (height, width, 3)."""
    canvas = FigureCanvasAgg(next(galleries(labeled, nearest, num_figures=1)))
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def _show(axes: Axes, image: Tensor, text: str, color: str, frame: float = 0.8) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(text, color=color, fontsize=10)
    for spine in axes.spines.values():
        spine.set(visible=True, color=color, linewidth=frame)


DPI = 150
GALLERY_FIGURES = 3


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

    The plots' names are fixed: ``retrieval_DATASET_bank_{train,test}``, ``share_DATASET``, ``probes_DATASET``,
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
    retrievals = [(name, bank) for name in run.dataset_names for bank in BANKS]
    yield (
        "Retrieval",
        [
            _picture(f"retrieval_{name}_bank_{bank}", f"retrieval on {name}", retrieval_plot(run, name, bank))
            for name, bank in retrievals
        ]
        + [
            _picture(f"share_{name}", f"share of the teacher's advantage on {name}", figure)
            for name in run.dataset_names
            if (figure := share_plot(run, name)) is not None
        ],
    )
    yield (
        "Probes",
        [_picture(f"probes_{name}", f"probes on {name}", probe_plot(run, name)) for name in run.probed],
    )
    yield "Training", [_picture(*curve) for curve in curves(run)]
    for name in run.looked_up:
        yield f"Nearest images of the queries of {name} (bank train)", list(_neighbor_pictures(run, name))


def _neighbor_pictures(run: Run, dataset: str) -> Iterator[Picture]:
    """Draw the confusion matrix and the gallery of a data set, with its train images as the bank."""
    bank, queries, class_names = run.datasets[dataset]
    nearest = run.neighbors[dataset]["train"].long()
    confusion = confusion_plot(queries.labels, bank.labels[nearest[:, 0]], class_names)
    yield _picture(f"confusion_{dataset}", f"confusion matrix of {dataset}", confusion)
    for i, shown in enumerate(galleries(run.datasets[dataset], nearest, GALLERY_FIGURES)):
        yield _picture(f"gallery_{dataset}_{i + 1}", f"queries of {dataset} and their nearest images", shown)


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
        share = None if before is None or teacher is None else gap_closed(before, after, teacher)
        if share is not None:
            yield Tile("of the teacher's advantage", f"{100 * share:.0f} %", f"recovered on {name}, bank train")
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
