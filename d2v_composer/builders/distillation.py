"""Build the teacher, the student and the model that distills one into the other."""

from d2v_composer.checkpoints.load import load_teacher
from d2v_composer.config.schema import TeacherConfig, TrainConfig
from d2v_composer.models.distillation import DistillationModel
from d2v_composer.models.execution import choose_precision, compile_model, find_missing
from d2v_composer.models.teacher import Teacher
from d2v_composer.system.errors import InputError, errors_of
from d2v_composer.system.ranks import node_leaders_first


def build_model(config: TrainConfig) -> DistillationModel:
    """Build the model from the sections ``teacher``, ``student``, ``prediction`` and ``targets``.

    Raises:
        InputError: The teacher's file cannot be used, or another setting does not fit it.
    """
    with node_leaders_first("the teacher"):
        teacher = build_teacher(config.teacher)
    return join_student(config, teacher)


def join_student(config: TrainConfig, teacher: Teacher) -> DistillationModel:
    """Build the model on a teacher.

    Raises:
        InputError: A setting does not fit it.
    """
    check_fit(config, teacher)
    targets, precision = config.targets, choose_precision(config.precision)
    with errors_of("student"):
        layer_mean = targets.model_dump(include={"normalization", "final_layer_norm"})
        student = teacher.build_student(**config.student.model_dump(), **layer_mean)
    teacher.encoder.half_residual = config.half_residual
    uses_fsdp = config.parallelism_config.fsdp is not None
    if uses_fsdp:
        teacher.encoder.keep_scale_whole()
    else:  # FSDP casts what it gathers, and needs one dtype in a block
        teacher.cast_weights(precision.dtype)
    with errors_of("targets"):
        model = DistillationModel(
            teacher,
            student,
            config.prediction,
            targets.extra_tokens,
            targets.average_top_k_layers,
            precision.cpu_bf16,
            targets.source,
        )
    if config.compile:
        if (missing := find_missing()) is not None:
            raise InputError(f"compile: {missing}; install it, or set compile=false")
        compile_model(model, joins_frozen_blocks=not uses_fsdp, choice=config.compile)
    if config.activation_checkpointing:
        student.checkpoint_activations()
    return model


def build_teacher(config: TeacherConfig) -> Teacher:
    """Load the teacher that the section ``teacher`` describes.

    Raises:
        InputError: Its file cannot be used.
    """
    try:
        return load_teacher(config.checkpoint, **config.model_dump(exclude={"checkpoint"}))
    except InputError as error:
        key = "teacher." if str(error).startswith(tuple(TeacherConfig.model_fields)) else "teacher.checkpoint: "
        raise InputError(f"{key}{error}") from error


def check_fit(config: TrainConfig, teacher: Teacher) -> None:
    """Check the settings that depend on the teacher.

    Raises:
        InputError: This teacher does not allow one of them.
    """
    top_k, depth = config.targets.average_top_k_layers, teacher.config.depth
    if top_k is not None and top_k > depth:
        raise InputError(f"targets.average_top_k_layers: must be at most the teacher's depth {depth}, got {top_k}")
