"""Build teacher, student and the model that distils them."""

from dataclasses import asdict

import torch

from d2v_composer.checkpoints.load import load_teacher
from d2v_composer.config.schema import TeacherConfig, TrainConfig
from d2v_composer.models.compilation import compile_model
from d2v_composer.models.distillation import DistillationModel
from d2v_composer.models.precision import choose_precision
from d2v_composer.models.teacher import Teacher
from d2v_composer.system.errors import InputError
from d2v_composer.system.multi_node import node_leaders_first

__all__ = ["build_model", "build_teacher"]


def build_model(config: TrainConfig) -> DistillationModel:
    """Build the model of the sections ``teacher``, ``student``, ``prediction`` and ``targets``.

    Raises:
        InputError: The teacher's file cannot be used, or another setting does not fit it.
    """
    with node_leaders_first("the teacher"):
        teacher = build_teacher(config.teacher)
    check_fit(config, teacher)
    try:
        student = teacher.build_student(**asdict(config.student), normalisation=config.targets.normalisation)
    except ValueError as error:
        raise InputError(f"student: {error}") from error
    precision = choose_precision(config.precision)
    uses_fsdp = config.parallelism_config.fsdp is not None
    if not uses_fsdp:  # FSDP casts what it gathers, and needs one dtype in a block
        teacher.cast_weights(getattr(torch, config.frozen_dtype) if config.frozen_dtype else precision.dtype)
    targets, cpu_bf16 = config.targets, precision.cpu_bf16
    options = (targets.extra_tokens, targets.average_top_k_layers, cpu_bf16, targets.source)
    model = DistillationModel(teacher, student, config.prediction, *options)
    if config.compile:
        compile_model(model, packs_weights=not torch.cuda.is_available() and not uses_fsdp)
    if config.activation_checkpointing:
        student.checkpoint_activations()
    return model


def build_teacher(config: TeacherConfig) -> Teacher:
    """Load the teacher of the section ``teacher``.

    Raises:
        InputError: Its file cannot be used.
    """
    return load_teacher(
        config.checkpoint,
        config.weights,
        model=config.model,
        first_blocks=config.first_blocks,
        image_size=config.image_size,
        option="teacher.{}".format,
    )


def check_fit(config: TrainConfig, teacher: Teacher) -> None:
    """Refuse settings that this teacher does not allow."""
    top_k, depth = config.targets.average_top_k_layers, teacher.config.depth
    if top_k is not None and top_k > depth:
        raise InputError(f"targets.average_top_k_layers: must be at most the teacher's depth {depth}, got {top_k}")
    if config.retrieval.pooling == "cls" and not teacher.has_cls_token and any(config.retrieval.datasets.values()):
        raise InputError("retrieval.pooling: this teacher has no CLS token; allowed here: mean, mean_patches")
    if config.targets.extra_tokens != "regress" and not teacher.num_extra_tokens:
        raise InputError("targets.extra_tokens: this teacher has no extra tokens; allowed here: regress")
    if config.parallelism_config.fsdp is not None and teacher.encoder.alibi_scale is not None:
        raise InputError("parallelism_config.fsdp: this teacher has learned ALiBi scales, which are not sharded")
