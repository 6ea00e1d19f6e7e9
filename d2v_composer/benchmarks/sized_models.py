"""Models of the benchmarks' sizes, with random weights."""

from typing import Any

from torch import nn

from d2v_composer.benchmarks.sizes import SIZES, STUDENT_DEPTH
from d2v_composer.models.block import init_linear_layers
from d2v_composer.models.data2vec2 import Data2Vec2, Data2Vec2Config
from d2v_composer.models.distillation import DistillationModel
from d2v_composer.models.sizes import height_and_width
from d2v_composer.models.timm_config import PREFIX
from d2v_composer.models.timm_encoder import build_timm_model, materialize
from d2v_composer.models.timm_teacher import TimmTeacher, teacher_config
from d2v_composer.system.errors import InputError

__all__ = ["build_equal_model", "build_sized_model"]


def build_sized_model(size: str, image_size: str | None = None) -> DistillationModel:
    """Build a teacher of a size, or of a model of timm's, and the paper's student for it.

    Args:
        size: One of ``SIZES``, or ``timm/NAME``.
        image_size: Of timm's: pixels a side, or HEIGHTxWIDTH; default timm's for this model.

    Raises:
        InputError: The timm model cannot be a teacher.
    """
    if size.startswith(PREFIX):
        teacher = build_timm_teacher(size, image_size)
        return DistillationModel(teacher, teacher.build_student())
    teacher = Data2Vec2(Data2Vec2Config(**SIZES[size]))
    init_linear_layers(teacher)
    return DistillationModel(teacher, teacher.build_student(depth=STUDENT_DEPTH[size]))


def build_equal_model(timm_teacher: TimmTeacher) -> DistillationModel | None:
    """Build a data2vec 2.0 teacher of a timm teacher's sizes, and the paper's student for it.

    Returns:
        ``None`` if data2vec 2.0 has no such sizes: its images are square.
    """
    sizes = timm_teacher.config
    (rows, columns), (height, width) = sizes.grid_size, height_and_width(sizes.image_size)
    if (rows, height) != (columns, width):
        return None
    mlp = timm_teacher.block_list[0].block.mlp
    num_weights = sum(layer.weight.numel() for layer in mlp.modules() if isinstance(layer, nn.Linear))
    config = Data2Vec2Config(
        embed_dim=sizes.embed_dim,
        num_heads=sizes.num_heads,
        mlp_ratio=num_weights / (2 * sizes.embed_dim**2),  # SwiGLU has three matrices
        prenet_depth=sizes.first_blocks,
        depth=sizes.depth,
        average_top_k_layers=sizes.average_top_k_layers,
        num_extra_tokens=sizes.num_extra_tokens,
        image_size=height,
        patch_size=height // rows,
    )
    teacher = Data2Vec2(config)
    init_linear_layers(teacher)
    return DistillationModel(teacher, teacher.build_student())


def build_timm_teacher(name: str, image_size: str | None) -> TimmTeacher:
    try:
        model: Any = build_timm_model(name, image_size)
    except ValueError as error:
        raise InputError(f"--teacher: {error}") from error
    materialize(model).init_weights()
    return TimmTeacher(model, teacher_config(name, model))
