"""Build the labelled sets of a retrieval, and the models that an evaluation compares."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import torch

from d2v_composer.builders.trained_model import load_trained_model
from d2v_composer.checkpoints.headline import ChosenEmbedding, choose_embedding
from d2v_composer.config.evaluate import EvaluateConfig
from d2v_composer.config.schema import LookupConfig
from d2v_composer.data.labelled_sets import LabelledSet, load_labelled_set
from d2v_composer.evaluation.evaluate import Candidate
from d2v_composer.evaluation.references import build_embeds
from d2v_composer.models.encoder import Encoder, EncoderConfig
from d2v_composer.models.sizes import ImageSize
from d2v_composer.models.student import Student
from d2v_composer.models.transformer import Transformer

__all__ = ["Comparison", "build_comparison", "build_labelled_sets"]

GFLOP_PER_MAC = 2e-9


class Comparison(NamedTuple):
    """The embeddings that an evaluation compares."""

    candidates: list[Candidate]
    """On the device, in eval mode."""
    sizes: EncoderConfig
    """Their encoder's."""
    embedding: ChosenEmbedding
    """The headline."""


def build_labelled_sets(lookup: LookupConfig, image_size: ImageSize, interpolation: str) -> dict[str, LabelledSet]:
    """Load the data sets of a section ``datasets``, except those that are off.

    Args:
        lookup: The section and ``max_images``.
        image_size: The model's.
        interpolation: The model's.

    Raises:
        InputError: A data set cannot be used.
    """
    load = partial(load_labelled_set, image_size=image_size, interpolation=interpolation, max_images=lookup.max_images)
    return {
        name: load(**asdict(labelled)).numbered() for name, labelled in lookup.datasets.items() if labelled is not None
    }


def build_comparison(config: EvaluateConfig, device: str) -> Comparison:
    """Load a model and its comparisons: pixels, the encoder alone, an untrained student, and the teacher if known.

    Raises:
        InputError: A file cannot be used, or the model has no CLS token to read.
    """
    student, teacher = load_trained_model(config)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        if student is not None:
            model, untrained = student, Student(student.encoder, student.config)
        else:
            assert teacher is not None  # one of them is there
            model, untrained = teacher, teacher.build_student()
    embedding = choose_embedding(model, model.provenance, config.pooling, config.representation)
    named = {"untrained student": untrained, "student": student, "teacher": teacher}
    models = {name: model.eval().to(device) for name, model in named.items() if model is not None}
    encoder = untrained.encoder
    return Comparison(_candidates(encoder, models), encoder.config, embedding)


def _candidates(encoder: Encoder, models: Mapping[str, Transformer]) -> list[Candidate]:
    """Return the embeddings to compare, with the number of weights and the GFLOP per image of each."""
    num_weights, macs = sum(map(torch.numel, encoder.parameters())), encoder.forward_macs()
    costs = {"pixels": (0, 0.0), "encoder": (num_weights, GFLOP_PER_MAC * macs)}
    for name, model in models.items():
        costs[name] = (sum(map(torch.numel, model.parameters())), GFLOP_PER_MAC * (macs + model.forward_macs()))
    return [Candidate(name, embed, *costs[name]) for name, embed in build_embeds(encoder, models).items()]
