"""The student: a few trainable blocks on the teacher's frozen encoder.

Shapes: B images, T time steps, D channels.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from d2v_composer.models.alibi import autocast_dtype
from d2v_composer.models.block import Block, init_linear_layers
from d2v_composer.models.image_encoder import ImageEncoder
from d2v_composer.models.sizes import MAX_DEPTH, MAX_WIDTH, check_mlp_ratio, check_whole
from d2v_composer.models.transformer import Transformer

__all__ = ["Init", "Student", "StudentConfig", "init_from_teacher"]

Init = Literal["random", "teacher_attention", "teacher_blocks"]


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Sizes of a student; its width and norm_eps are the encoder's.

    Raises:
        ValueError: A size is out of range.
    """

    depth: int = 5
    mlp_ratio: float = 3.0
    num_heads: int = 12
    num_alibi_heads: int = 12
    """0: no ALiBi."""

    def __post_init__(self) -> None:
        check_whole("student depth", self.depth, 1, MAX_DEPTH)
        check_whole("student num_heads", self.num_heads, 1, MAX_WIDTH)
        check_whole("student num_alibi_heads", self.num_alibi_heads, 0, self.num_heads)


class Student(Transformer):
    """The student. Only ``blocks`` train; the encoder is the teacher's, frozen.

    Args:
        encoder: Shared with the teacher.
        config: The sizes.
        provenance: Origin of teacher and student, stored in exported files.

    Raises:
        ValueError: The sizes do not fit the encoder's.
    """

    def __init__(self, encoder: ImageEncoder, config: StudentConfig, provenance: dict[str, Any] | None = None) -> None:
        dim, norm_eps = encoder.config.embed_dim, encoder.config.norm_eps
        check_mlp_ratio(config.mlp_ratio, dim)
        hidden_dim = int(dim * config.mlp_ratio)
        if dim % config.num_heads:
            raise ValueError(f"student num_heads must divide the width {dim}, got {config.num_heads}")
        super().__init__(encoder, [Block(dim, config.num_heads, hidden_dim, norm_eps) for _ in range(config.depth)])
        self.config = config
        self.provenance = provenance or {}
        self.alibi = encoder.config.build_alibi(config.num_heads, config.num_alibi_heads)
        init_linear_layers(self.blocks)

    def block_biases(self, x_BTD: Tensor) -> list[Tensor | None]:
        bias = None if self.alibi is None else self.alibi(x_BTD.shape[1], autocast_dtype(x_BTD), x_BTD.device)
        return [bias] * len(self.blocks)

    def backward_macs(self) -> int:
        """Return the backward pass's multiply-accumulates: twice the forward's, less the gradient of the input."""
        first_qkv = self.block_list[0].attn.qkv.weight.numel()
        return 2 * self.forward_macs() - self.encoder.config.num_steps * first_qkv


@torch.no_grad()
def init_from_teacher(student: Student, teacher: Transformer, init: Init) -> None:
    """Copy the teacher's first blocks into the student's.

    Args:
        student: Changed in place.
        teacher: On the same encoder.
        init: ``teacher_attention`` copies each block's attention, ``teacher_blocks`` whole blocks.

    Raises:
        ValueError: The teacher has too few blocks, or blocks of other sizes.
    """
    if init not in get_args(Init):
        raise ValueError(f"init must be one of {', '.join(get_args(Init))}, got {init!r}")
    if len(student.blocks) > len(teacher.blocks):
        raise ValueError(
            f"init {init}: the student has {len(student.blocks)} blocks, the teacher {len(teacher.blocks)}"
        )
    for block, source_block in zip(student.block_list, teacher.block_list, strict=False):
        target: nn.Module = block.attn if init == "teacher_attention" else block
        source: nn.Module = source_block.attn if init == "teacher_attention" else source_block
        for name, tensor in target.named_parameters():
            shape, source_shape = tuple(tensor.shape), tuple(source.get_parameter(name).shape)
            if shape != source_shape:
                raise ValueError(
                    f"init {init} needs the teacher's sizes: {name} {shape} against the teacher's {source_shape}"
                )
        target.load_state_dict(source.state_dict())
    num_heads = teacher.block_list[0].attn.num_heads
    if student.config.num_heads != num_heads:
        raise ValueError(f"init {init} needs the teacher's {num_heads} heads")
