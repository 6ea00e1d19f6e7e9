"""Show samples in an HTML page, with their pictures and sounds."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch
from matplotlib.image import imsave
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d

from d2v_composer.data.audio import encode_flac
from d2v_composer.evaluation.results import Result
from d2v_composer.evaluation.rows import STUDENT, TEACHER
from d2v_composer.models.audio import LogMel
from d2v_composer.models.configs import SAMPLE_RATE
from d2v_composer.sources.labeled import EvaluationSet, LabeledSamples

QUERIES, NEIGHBORS_SHOWN = 12, 3
HEARD = 10 * SAMPLE_RATE  # samples of a clip that are played and drawn
SHOWN_SIZE = 96  # side of an image, in pixels


class Shown(NamedTuple):
    """A sample in a gallery."""

    title: str
    """The first line below the picture."""
    mark: str
    """✓, ✗ or empty."""
    label: str
    """The sample's class or id, or empty."""
    picture: bytes
    """Contents of a PNG file."""
    sound: bytes
    """Contents of a FLAC file; empty for an image."""


def render(template: str, **values: Any) -> str:
    """Return an HTML page, made from a template in this module's folder."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(template).render(base64=base64.b64encode, **values)


def galleries(
    datasets: Mapping[str, EvaluationSet], results: Sequence[Result], unit: str
) -> Iterator[tuple[str, str, list[list[Shown]]]]:
    """Yield the name, a note and the gallery of each data set for which results have the student's nearest samples."""
    for name, labeled in datasets.items():
        nearest = {
            row: result.nearest
            for row in (STUDENT, TEACHER)
            for result in results
            if (result.row, result.dataset) == (row, name) and result.nearest is not None
        }
        if STUDENT in nearest:
            chosen = torch.randperm(len(labeled.test.labels), generator=torch.Generator().manual_seed(0))[:QUERIES]
            of, marks = (
                ("train", f"✓ marks {unit} of the query's class, ✗ {unit} of another class")
                if labeled.has_labels
                else ("other test", f"✓ marks {unit} that both models find")
            )
            beside = " and in its teacher's embedding" if TEACHER in nearest else ""
            about = f"Each row shows a query, then its nearest {of} {unit} in the student's embedding{beside}"
            yield name, f"{about}; {marks}.", gallery(labeled, chosen, nearest)


def gallery(labeled: EvaluationSet, chosen: Tensor, nearest: Mapping[str, Tensor]) -> list[list[Shown]]:
    """Return a row for each chosen test sample, with the sample and each model's nearest samples.

    With labels, the nearest samples are train samples; ✓ marks the query's class, ✗ another class. Without labels, the
    nearest samples are other test samples; ✓ marks a sample that all models find.

    Args:
        labeled: The data set.
        chosen: Indices of the test samples, (Q,).
        nearest: Name of a model → indices of the samples nearest to each of the N test samples, (N, K), nearest first.
    """
    train, queries, class_names, _ = labeled
    bank = train if labeled.has_labels else queries

    def show(model: str, mark: str, split: LabeledSamples, i: Tensor) -> Shown:
        sample = split.samples[i]
        number = int(split.labels[i])
        label = (class_names[number] if class_names else str(number)) if labeled.has_labels else ""
        return Shown(model, mark, label, picture(sample), sound(sample))

    rows = []
    for query in chosen:
        row = [show("query", "", queries, query)]
        found = {model: indices[query, :NEIGHBORS_SHOWN].long() for model, indices in nearest.items()}
        for model, neighbors in found.items():
            for i in neighbors:
                if labeled.has_labels:
                    mark = "✓" if bank.labels[i] == queries.labels[query] else "✗"
                else:
                    mark = "✓" if len(found) > 1 and all(i in others for others in found.values()) else ""
                row.append(show(model, mark, bank, i))
        rows.append(row)
    return rows


def picture(sample: Tensor) -> bytes:
    """Return a picture of a sample as a PNG file.

    Args:
        sample: An image, (3, height, width) uint8, or a clip, (L,) float32, of which the log-mel spectrogram of the
            first 10 seconds is drawn.
    """
    if sample.ndim == 3:
        if sample.shape[1] > SHOWN_SIZE:
            sample = adaptive_avg_pool2d(sample.float(), SHOWN_SIZE).byte()
        pixels = sample.permute(1, 2, 0)
    else:
        log_mel_1NM, _ = LogMel()(sample[None, :HEARD])
        log_mel_MN = log_mel_1NM[0].T.flip(0)
        pixels = adaptive_avg_pool1d(log_mel_MN, len(log_mel_MN))
    buffer = io.BytesIO()
    imsave(buffer, pixels.numpy(), format="png")
    return buffer.getvalue()


def sound(sample: Tensor) -> bytes:
    """Return the first 10 seconds of a clip, (L,) float32, as a FLAC file; for an image, no bytes."""
    return encode_flac(sample[:HEARD].numpy()) if sample.ndim == 1 else b""
