"""Build teacher, student and the model that distils them."""

from dataclasses import asdict

import torch

from d2v_composer.checkpoints.load import load_teacher
from d2v_composer.config.checks import compute_dtype
from d2v_composer.config.schema import TrainConfig
from d2v_composer.models.compilation import compile_model
from d2v_composer.models.distillation import DistillationModel
from d2v_composer.system.errors import InputError
from d2v_composer.system.multi_node import node_leaders_first

__all__ = ["build_model", "build_precision"]


def build_model(config: TrainConfig) -> DistillationModel:
    """Teacher and student as the sections ``teacher``, ``student``, ``prediction`` and ``targets`` say.

    Raises:
        InputError: The teacher's file cannot be used, or the student does not fit it.
    """
    with node_leaders_first("the teacher"):
        teacher = load_teacher(config.teacher.checkpoint, config.teacher.weights)
    top_k = config.targets.average_top_k_layers
    if top_k is not None and top_k > teacher.config.depth:
        raise InputError(
            f"targets.average_top_k_layers: must be at most the teacher's depth {teacher.config.depth}, got {top_k}"
        )
    if config.retrieval.pooling == "cls" and not teacher.num_extra_tokens and config.retrieval.datasets:
        raise InputError("retrieval.pooling: this teacher has no CLS token; allowed here: mean, mean_patches")
    try:
        student = teacher.build_student(**asdict(config.student))
    except ValueError as error:
        raise InputError(f"student: {error}") from error
    uses_fsdp = config.parallelism_config.fsdp is not None
    if not uses_fsdp:  # it casts what it gathers, and wants one dtype in a block
        teacher.cast_weights(getattr(torch, config.frozen_dtype or compute_dtype(config)))
    elif teacher.encoder.alibi_scale is not None:
        raise InputError("parallelism_config.fsdp: this teacher has learned ALiBi scales, which are not sharded")
    model = DistillationModel(
        teacher, student, config.prediction, config.targets.extra_tokens, top_k, cpu_bf16=trains_in_cpu_bf16(config)
    )
    if config.compile:
        compile_model(model, packs_weights=not torch.cuda.is_available() and not uses_fsdp)
    if config.activation_checkpointing:
        student.checkpoint_activations()
    return model


def trains_in_cpu_bf16(config: TrainConfig) -> bool:
    """Whether the model has to see to amp_bf16 itself: on a CPU the Trainer refuses it."""
    return config.precision == "amp_bf16" and not torch.cuda.is_available()


def build_precision(config: TrainConfig) -> str:
    """The Trainer's precision."""
    return "fp32" if trains_in_cpu_bf16(config) else config.precision
