"""Write a run's report as one HTML file that contains its plots; write the plots as PNG files too."""

import base64
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import torch
import yaml
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d

from d2v_composer.data.audio import encode_flac
from d2v_composer.data.labeled import EvaluationSet
from d2v_composer.evaluation.evaluate import gap_closed
from d2v_composer.evaluation.metrics import AGREEMENT, HEALTH_STATES, TEACHER, read_accuracies, retrieval_from
from d2v_composer.models.audio import LogMel
from d2v_composer.models.configs import SAMPLE_RATE
from d2v_composer.report.answer import answer
from d2v_composer.report.plots import STYLE, WIDTH, accuracy_plots, curves, to_png
from d2v_composer.report.run import Run, latest
from d2v_composer.system.files import write_atomically

GALLERY_FIGURES, QUERIES_A_FIGURE, NEIGHBORS_SHOWN = 3, 4, 3
HEARD = 10 * SAMPLE_RATE  # samples of a clip that are played and drawn


Clips = Sequence[Sequence[tuple[str, bytes]]]
"""Rows of labels and FLAC files."""


def write_report(run: Run, folder: Path) -> list[Path]:
    """Write ``report.html`` and its plots as ``report/*.png`` into a run's folder.

    The plots' names are fixed: ``retrieval_DATASET_bank_{train,test}``, ``gap_closed_DATASET``, ``probes_DATASET``,
    ``gallery_DATASET_{1,2,3}``, ``loss`` and the other curves.

    Returns:
        The written files, the page first.
    """
    sections = {
        title: [(name, to_png(figure), *(clips or [()])) for name, figure, *clips in plots]
        for title, plots in _sections(run)
        if plots
    }
    template = Path(__file__).with_name("page.html").read_text("utf-8")
    page = jinja2.Template(template, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).render(
        record=run.record,
        num_batches=int(latest(run.log.get("time/batch", {})) or 0),
        warnings=list(_warnings(run)),
        answer=" ".join(answer(run)),
        tiles=list(_tiles(run)),
        sections=sections,
        base64=base64.b64encode,
        dump=partial(yaml.safe_dump, sort_keys=False, allow_unicode=True),
    )
    files = {f"report/{name}.png": png for plots in sections.values() for name, png, *_ in plots}
    (folder / "report").mkdir(exist_ok=True)
    for name, content in {**files, "report.html": page}.items():
        write_atomically(folder / name, content)
    return [folder / name for name in ("report.html", *files)]


def _sections(run: Run) -> Iterator[tuple[str, list[tuple[Any, ...]]]]:
    """Yield each section's title and its plots: name, figure and, if they can be heard, the clips in it."""
    yield "Retrieval and probes", list(accuracy_plots(run))
    yield "Training", list(curves(run))
    for name, labeled in run.datasets.items():
        if name not in run.neighbors:
            continue
        nearest = run.neighbors[name]["train"].long()
        chosen = torch.randperm(len(nearest), generator=torch.Generator().manual_seed(0))  # the same in every run
        parts = chosen[: GALLERY_FIGURES * QUERIES_A_FIGURE].split(QUERIES_A_FIGURE)
        shown = [gallery(run.modality.unit, labeled, part, nearest[part, :NEIGHBORS_SHOWN]) for part in parts]
        title = f"Nearest {run.modality.unit} of {name}'s queries (bank train)"
        yield title, [(f"gallery_{name}_{i}", *each) for i, each in enumerate(shown, 1)]


def _tiles(run: Run) -> Iterator[tuple[str, str, str]]:
    """Yield the numbers at the top of the page: label, value, note."""
    for k in (1, 5):
        if (accuracy := latest(run.log.get(f"metrics/test/top{k}", {}))) is not None:
            yield f"top-{k} on the test {run.modality.unit}", f"{100 * accuracy:.1f} %", ""
    for name in run.retrieval["datasets"]:
        k = min(run.retrieval["ks"])
        for measure, label in (retrieval_from("train", k), f"top-{k}, bank train"), (AGREEMENT, AGREEMENT.heading):
            student, teacher = (read_accuracies(run.log, name, measure, baseline=model) for model in ("", TEACHER))
            values = student.get(0), latest(student), latest(teacher)
            before, after, best = (None if value is None else round(100 * value, 1) for value in values)
            if after is None:
                continue
            others = {"untrained": before, TEACHER: best}
            notes = [f"{model} {value:.1f} %" for model, value in others.items() if value is not None]
            yield f"{name} {label}", f"{after:.1f} %", ", ".join(notes)
            if before is not None and best is not None and (closed := gap_closed(before, after, best)) is not None:
                yield "teacher gap closed", f"{100 * closed:.0f} %", f"{name}, {label}"


def _warnings(run: Run) -> Iterator[str]:
    """Yield each state that Health found, with its first and last batch."""
    for state in HEALTH_STATES:
        batches = [step for step, value in run.log.get(f"health/{state}", {}).items() if value]
        if batches:
            yield f"{state.replace('_', ' ')} at batches {min(batches)} to {max(batches)}"


@mpl.rc_context(STYLE)
def gallery(unit: str, labeled: EvaluationSet, chosen: Tensor, nearest: Tensor) -> tuple[Figure, Clips]:
    """Show test samples, one per row, and their nearest train samples, marked as right (tick) or wrong (cross).

    Args:
        unit: What several samples are called.
        labeled: A data set.
        chosen: Indices of the test samples, (Q,).
        nearest: Indices of their nearest train samples, nearest first, (Q, K).

    Returns:
        The figure, and a row of clips for each of its rows if the samples can be heard.
    """
    bank, queries, class_names, _ = labeled
    figure = Figure(figsize=(WIDTH, 1.72 * len(chosen)))
    grid = figure.subplots(len(chosen), nearest.shape[1] + 1, squeeze=False)
    clips = []
    for row, query, indices in zip(grid, chosen, nearest.long(), strict=True):
        label = queries.labels[query]
        shown = [(queries.samples[query], class_names[label], "k")]
        for index in indices:
            mark, color = ("✓", "tab:green") if bank.labels[index] == label else ("✗", "tab:red")
            shown.append((bank.samples[index], f"{mark} {class_names[bank.labels[index]]}", color))
        for axes, (sample, text, color) in zip(row, shown, strict=True):
            axes.imshow(picture(sample).numpy(), interpolation="nearest")
            axes.grid(visible=False)
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(text, color=color, fontsize=10)
            for spine in axes.spines.values():
                spine.set(visible=True, color=color, linewidth=3)
        clips.append([(text, encode_flac(sample[:HEARD].numpy())) for sample, text, _ in shown if sample.ndim == 1])
    figure.suptitle(f"query, then its nearest {unit}")
    return figure, list(filter(None, clips))


def picture(sample: Tensor) -> Tensor:
    """Return a picture of a sample as matplotlib draws it.

    Args:
        sample: An image, (3, height, width) uint8, or a clip, (L,).

    Returns:
        (height, width, 3) uint8; of a clip, a square log-mel spectrogram, high pitches on top.
    """
    if sample.ndim == 3:
        return sample.permute(1, 2, 0)
    log_mel_1NM, _ = LogMel()(sample[None, :HEARD])
    log_mel_NM = log_mel_1NM[0]
    return adaptive_avg_pool1d(log_mel_NM.T.flip(0), len(log_mel_NM.T))
