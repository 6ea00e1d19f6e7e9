"""A run's report as one HTML file, with its plots inside it and beside it."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import jinja2
import torch
import yaml
from matplotlib.figure import Figure

from d2v_composer.callbacks.health import STATES
from d2v_composer.evaluation.bootstrap import share_recovered
from d2v_composer.evaluation.metric_names import BANKS, metric_key
from d2v_composer.report.plots import QUERIES_A_FIGURE, confusion_plot, curves, gallery, retrieval_plot
from d2v_composer.report.run import Run
from d2v_composer.system.atomic_files import write_atomically

__all__ = ["write_report"]

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
    """A number that is to be seen first."""

    label: str
    value: str
    note: str = ""


def write_report(run: Run, folder: Path) -> list[Path]:
    """Write ``report.html`` and its plots as ``report/*.png`` into a run's folder.

    Returns:
        What was written, the page first.
    """
    sections = {
        "Retrieval": [
            picture(f"retrieval_{name}_bank_{bank}", f"retrieval on {name}", retrieval_plot(run, name, bank))
            for name in run.dataset_names
            for bank in BANKS
        ],
        "Training": [picture(*curve) for curve in curves(run)],
    }
    for name in run.looked_up:
        sections[f"What the queries of {name} find (bank train)"] = list(_looked_up(run, name))
    page = jinja2.Environment(
        loader=jinja2.PackageLoader("d2v_composer.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("page.html")
    html = page.render(
        run_name=run.record["config"]["run_name"],
        progress=_progress(run),
        warnings=list(_warnings(run)),
        tiles=list(_tiles(run)),
        sections={title: pictures for title, pictures in sections.items() if pictures},
        details={
            "Command": run.record["command"],
            "Config": _as_yaml(run.record["config"]),
            "Versions": _as_yaml(run.record["versions"]),
            "Hardware": _as_yaml(run.record["hardware"]),
            "Teacher": _as_yaml(run.record["teacher"]),
        },
    )
    (folder / "report").mkdir(exist_ok=True)
    written = [folder / "report.html"]
    for each in (each for pictures in sections.values() for each in pictures):
        written.append(folder / "report" / f"{each.name}.png")
        write_atomically(written[-1], each.png)
    write_atomically(written[0], html)
    return written


def picture(name: str, title: str, figure: Figure) -> Picture:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return Picture(name, title, buffer.getvalue())


def _looked_up(run: Run, dataset: str) -> Iterator[Picture]:
    """Confusion matrix and gallery of one data set, with its train images as the bank."""
    bank, queries, class_names = run.datasets[dataset]
    nearest = run.neighbours[dataset]["train"].long()
    found = bank.labels[nearest[:, 0]]
    yield picture(
        f"confusion_{dataset}", f"confusion matrix of {dataset}", confusion_plot(queries.labels, found, class_names)
    )
    # From all over the set, the same ones in every run.
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(queries.labels), generator=generator)[: GALLERY_FIGURES * QUERIES_A_FIGURE]
    for i, part in enumerate(chosen.split(QUERIES_A_FIGURE)):
        shown = gallery(
            queries.images[part], queries.labels[part], bank.images, bank.labels, nearest[part, :3], class_names
        )
        yield picture(f"gallery_{dataset}_{i + 1}", f"queries of {dataset} and their nearest images", shown)


def _progress(run: Run) -> str:
    """How far the run has come."""
    config, hardware = run.record["config"], run.record["hardware"]
    batches = int(run.last("time/batch") or 0)
    device = hardware["gpu"] or hardware["cpu"]
    return f"{batches} batches of {config['max_duration']}, on {hardware['ranks']} × {device}"


def _tiles(run: Run) -> Iterator[Tile]:
    k = run.smallest_k
    for name in run.dataset_names:
        key = metric_key(name, "train", k)
        before, after = run.first_student(name), run.last(key)
        teacher = run.last(metric_key(name, "train", k, reference="teacher"))
        assert after is not None  # dataset_names are those with one
        others = {"untrained": before, "teacher": teacher}
        notes = [f"{who} {100 * value:.1f} %" for who, value in others.items() if value is not None]
        yield Tile(f"{name} top-{k}, bank train", f"{100 * after:.1f} %", ", ".join(notes))
        if before is None or teacher is None:
            continue
        if (share := share_recovered(before, after, teacher)) is not None:
            yield Tile("of the teacher's advantage", f"{100 * share:.0f} %", f"recovered on {name}")
    if (loss := run.last("loss/train/total")) is not None:
        yield Tile("training loss", f"{loss:.4f}", "of the last batch")
    if speeds := run.log.get("throughput/images_per_sec"):
        yield Tile("images/s", f"{median(speeds.values()):.0f}", "median")
    if waits := run.log.get("throughput/data_wait"):
        yield Tile("waiting for images", f"{100 * median(waits.values()):.0f} %", "of the time, median")


def _warnings(run: Run) -> Iterator[str]:
    """The states that Health found, and when."""
    for state in STATES:
        batches = [step for step, value in sorted(run.log.get(f"health/{state}", {}).items()) if value]
        if batches:
            when = f"at batch {batches[0]}" if len(batches) == 1 else f"at batches {batches[0]} to {batches[-1]}"
            yield f"{state.replace('_', ' ')} {when} ({len(batches)} measurements)"


def _as_yaml(section: object) -> str:
    return yaml.safe_dump(section, sort_keys=False, allow_unicode=True).rstrip()
