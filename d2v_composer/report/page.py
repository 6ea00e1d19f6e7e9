"""Write a run's report as one HTML file that contains its pictures; write the plots as PNG files too."""

import base64
import io
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jinja2
import torch
import yaml
from matplotlib.image import imsave
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d

from d2v_composer.data.audio import encode_flac
from d2v_composer.evaluation.rows import STUDENT, TEACHER
from d2v_composer.evaluation.run_log import HEALTH_STATES
from d2v_composer.models.audio import LogMel
from d2v_composer.models.configs import SAMPLE_RATE
from d2v_composer.report.plots import accuracy_plots, curves, to_png
from d2v_composer.report.run import Run, latest, verdicts
from d2v_composer.report.tables import accuracy_tables, cost_table
from d2v_composer.sources.labeled import EvaluationSet, LabeledSamples
from d2v_composer.system.files import write_atomically

QUERIES, NEIGHBORS_SHOWN = 12, 3
HEARD = 10 * SAMPLE_RATE  # samples of a clip that are played and drawn


class Shown(NamedTuple):
    """A sample in a gallery."""

    model: str
    """``query``, or the model that found the sample."""
    mark: str
    """✓ if the sample is of the query's class, else ✗; empty for the query."""
    label: str
    picture: bytes
    """A PNG file."""
    sound: bytes
    """A FLAC file; empty for an image."""


def write_report(run: Run, folder: Path) -> list[Path]:
    """Write ``report.html`` and its plots as ``report/*.png`` into a run's folder.

    The plots' names are fixed: ``retrieval_DATASET_bank_{train,test}``, ``gap_closed_DATASET``, ``probes_DATASET``,
    ``loss`` and the other curves.

    Returns:
        The written files, the page first.
    """
    results, training = ([(name, to_png(figure)) for name, figure in plots(run)] for plots in (accuracy_plots, curves))
    template = Path(__file__).with_name("page.html").read_text("utf-8")
    page = jinja2.Template(template, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).render(
        record=run.record,
        num_batches=int(latest(run.log.get("time/batch", {})) or 0),
        warnings=[
            f"{state.replace('_', ' ')} at batches {min(batches)} to {max(batches)}"
            for state in HEALTH_STATES
            if (batches := [step for step, value in run.log.get(f"health/{state}", {}).items() if value])
        ],
        answers=list(verdicts(run)),
        tables=[*accuracy_tables(run.results, run.retrieval["datasets"]), *cost_tables(run)],
        accuracies={k: latest(run.log.get(f"metrics/test/top{k}", {})) for k in (1, 5)},
        results=results,
        training=training,
        unit=run.modality.unit,
        galleries=dict(_galleries(run)),
        base64=base64.b64encode,
        dump=partial(yaml.safe_dump, sort_keys=False, allow_unicode=True),
    )
    files = {f"report/{name}.png": png for name, png in results + training}
    (folder / "report").mkdir(exist_ok=True)
    for name, content in {**files, "report.html": page}.items():
        write_atomically(folder / name, content)
    return [folder / name for name in ("report.html", *files)]


def cost_tables(run: Run) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield a distillation's table of sizes."""
    if costs := run.record.get("costs"):
        yield "Size and computation of what d2v export writes", cost_table(costs, run.modality.cost_unit)


def _galleries(run: Run) -> Iterator[tuple[str, list[list[Shown]]]]:
    """Yield each data set's name and gallery, of test samples that are the same in every run."""
    for name, labeled in run.datasets.items():
        nearest = {
            row: result.nearest
            for row in (STUDENT, TEACHER)
            for result in run.results
            if (result.row, result.dataset, result.column.bank) == (row, name, "train") and result.nearest is not None
        }
        if STUDENT in nearest:
            chosen = torch.randperm(len(labeled.test.labels), generator=torch.Generator().manual_seed(0))[:QUERIES]
            yield name, gallery(labeled, chosen, nearest)


def gallery(labeled: EvaluationSet, chosen: Tensor, nearest: Mapping[str, Tensor]) -> list[list[Shown]]:
    """Show test samples, each in a row with the train samples nearest to it in each model, marked as right or wrong.

    Args:
        labeled: A data set.
        chosen: Indices of the test samples, (Q,).
        nearest: Model → indices of the train samples nearest to each test sample, nearest first, (N, K).
    """
    bank, queries, class_names, _ = labeled

    def show(model: str, mark: str, split: LabeledSamples, i: Tensor) -> Shown:
        sample = split.samples[i]
        return Shown(model, mark, class_names[split.labels[i]], picture(sample), sound(sample))

    rows = []
    for query in chosen:
        row = [show("query", "", queries, query)]
        for model, indices in nearest.items():
            for i in indices[query, :NEIGHBORS_SHOWN].long():
                row.append(show(model, "✓" if bank.labels[i] == queries.labels[query] else "✗", bank, i))
        rows.append(row)
    return rows


def picture(sample: Tensor) -> bytes:
    """Return a picture of a sample as a PNG file.

    Args:
        sample: An image, (3, height, width) uint8, or a clip, (L,), of which a square log-mel spectrogram is drawn,
            high pitches on top.
    """
    if sample.ndim == 3:
        pixels = sample.permute(1, 2, 0)
    else:
        log_mel_1NM, _ = LogMel()(sample[None, :HEARD])
        log_mel_MN = log_mel_1NM[0].T.flip(0)
        pixels = adaptive_avg_pool1d(log_mel_MN, len(log_mel_MN))
    buffer = io.BytesIO()
    imsave(buffer, pixels.numpy(), format="png")
    return buffer.getvalue()


def sound(sample: Tensor) -> bytes:
    """Return a clip, (L,), as a FLAC file; for an image, no bytes."""
    return encode_flac(sample[:HEARD].numpy()) if sample.ndim == 1 else b""
