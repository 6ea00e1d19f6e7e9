"""Models of the benchmarks' sizes, with random weights."""

from typing import Any

from d2v_composer.benchmarks.sizes import SIZES, STUDENT_DEPTH
from d2v_composer.models.block import init_linear_layers
from d2v_composer.models.data2vec2 import Data2Vec2, Data2Vec2Config
from d2v_composer.models.distillation import DistillationModel
from d2v_composer.models.timm_config import PREFIX
from d2v_composer.models.timm_encoder import build_timm_model, materialize
from d2v_composer.models.timm_teacher import TimmTeacher, teacher_config
from d2v_composer.system.errors import InputError

__all__ = ["build_sized_model"]


def build_sized_model(size: str) -> DistillationModel:
    """Build a teacher of a size, or of a model of timm's, and the paper's student for it.

    Args:
        size: One of ``SIZES``, or ``timm/NAME``.

    Raises:
        InputError: The timm model cannot be a teacher.
    """
    if size.startswith(PREFIX):
        teacher = build_timm_teacher(size)
        return DistillationModel(teacher, teacher.build_student())
    teacher = Data2Vec2(Data2Vec2Config(**SIZES[size]))
    init_linear_layers(teacher)
    return DistillationModel(teacher, teacher.build_student(depth=STUDENT_DEPTH[size]))


def build_timm_teacher(name: str) -> TimmTeacher:
    try:
        model: Any = build_timm_model(name)
    except ValueError as error:
        raise InputError(f"--teacher: {error}") from error
    materialize(model).init_weights()
    return TimmTeacher(model, teacher_config(name, model))
