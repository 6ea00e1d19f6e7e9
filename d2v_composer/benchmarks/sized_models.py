"""Models of the benchmarks' sizes, with random weights."""

from typing import Any

from d2v_composer.models.block import init_linear_layers
from d2v_composer.models.data2vec2 import Data2Vec2, Data2Vec2Config
from d2v_composer.models.distillation import DistillationModel
from d2v_composer.models.timm_config import PREFIX
from d2v_composer.models.timm_encoder import build_timm_model, materialize
from d2v_composer.models.timm_teacher import TimmTeacher, teacher_config
from d2v_composer.system.errors import InputError

__all__ = ["SIZES", "build_sized_model"]

SIZES = {
    "base": Data2Vec2Config(prenet_depth=2, num_extra_tokens=1, depth=10, average_top_k_layers=10),
    "large": Data2Vec2Config(
        embed_dim=1024, num_heads=16, prenet_depth=0, num_extra_tokens=1, depth=24, average_top_k_layers=18
    ),
    "quickstart": Data2Vec2Config(
        embed_dim=192,
        num_heads=6,
        prenet_depth=2,
        num_extra_tokens=1,
        depth=6,
        average_top_k_layers=6,
        image_size=32,
        patch_size=4,
    ),
}
STUDENT_DEPTH = {"base": 5, "large": 5, "quickstart": 3}


def build_sized_model(size: str) -> DistillationModel:
    """Build a teacher of a size, or of a model of timm's, and the paper's student for it.

    Args:
        size: base, large, quickstart, or ``timm/NAME``.

    Raises:
        InputError: The timm model cannot be a teacher.
    """
    if size.startswith(PREFIX):
        teacher = build_timm_teacher(size)
        return DistillationModel(teacher, teacher.build_student())
    teacher = Data2Vec2(SIZES[size])
    init_linear_layers(teacher)
    return DistillationModel(teacher, teacher.build_student(depth=STUDENT_DEPTH[size]))


def build_timm_teacher(name: str) -> TimmTeacher:
    try:
        model: Any = build_timm_model(name)
    except ValueError as error:
        raise InputError(f"--teacher: {error}") from error
    materialize(model).init_weights()
    return TimmTeacher(model, teacher_config(name, model))
