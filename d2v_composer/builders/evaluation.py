"""Build the labelled sets of a retrieval, and the models that an evaluation compares."""

from dataclasses import asdict

import torch

from d2v_composer.checkpoints.load import TimmWeights, load_any
from d2v_composer.config.schema import EvaluateConfig, LabelledSetConfig
from d2v_composer.data.labelled_sets import LabelledSet, load_labelled_set
from d2v_composer.evaluation.evaluate import Candidate
from d2v_composer.evaluation.references import build_embeds
from d2v_composer.models.encoder import EncoderConfig
from d2v_composer.models.sizes import ImageSize
from d2v_composer.models.student import Student
from d2v_composer.system.errors import InputError

__all__ = ["build_candidates", "build_labelled_sets"]


GFLOP_PER_MAC = 2e-9


def build_labelled_sets(
    chosen: dict[str, LabelledSetConfig | None], image_size: ImageSize, interpolation: str
) -> dict[str, LabelledSet]:
    """Load the data sets of a section ``datasets``, except those that are off.

    Args:
        chosen: The section.
        image_size: The model's.
        interpolation: The model's.

    Raises:
        InputError: A data set cannot be used.
    """
    return {
        name: load_labelled_set(**asdict(labelled), image_size=image_size, interpolation=interpolation)
        for name, labelled in chosen.items()
        if labelled is not None
    }


def build_candidates(config: EvaluateConfig, device: str) -> tuple[list[Candidate], EncoderConfig]:
    """Load a model and its comparisons: pixels, the encoder alone, an untrained student, and the teacher if known.

    Returns:
        The candidates on the device, in eval mode, and the sizes of their encoder.

    Raises:
        InputError: A file cannot be used, or the model has no CLS token to read.
    """
    timm_weights = TimmWeights(config.checkpoint, config.first_blocks, config.image_size)
    student, teacher = load_any(config.model, config.weights, config.teacher, "teacher=PATH", timm_weights)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        if student is not None:
            untrained = Student(student.encoder, student.config)
        else:
            assert teacher is not None  # load_any returns at least one of them
            untrained = teacher.build_student()
    encoder = untrained.encoder
    if config.pooling == "cls" and not untrained.has_cls_token:
        raise InputError("pooling: this model has no CLS token; allowed here: mean, mean_patches")
    num_weights, macs = sum(map(torch.numel, encoder.parameters())), encoder.forward_macs()
    named = {"untrained student": untrained, "student": student, "teacher": teacher}
    models = {name: model.eval().to(device) for name, model in named.items() if model is not None}
    costs = {"pixels": (0, 0.0), "encoder": (num_weights, GFLOP_PER_MAC * macs)}
    for name, model in models.items():
        costs[name] = (sum(map(torch.numel, model.parameters())), GFLOP_PER_MAC * (macs + model.forward_macs()))
    candidates = [Candidate(name, embed, *costs[name]) for name, embed in build_embeds(encoder, models).items()]
    return candidates, encoder.config
