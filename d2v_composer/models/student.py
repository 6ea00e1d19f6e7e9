"""The student: a few trainable blocks on the teacher's frozen encoder.

Shapes: B images, T tokens, D channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from d2v_composer.models.attention import Block, EntranceBlock, init_linear_layers
from d2v_composer.models.encoder import (
    MAX_DEPTH,
    MAX_WIDTH,
    Encoder,
    build_alibi,
    check_choice,
    check_number,
    check_whole,
)
from d2v_composer.models.targets import Normalization
from d2v_composer.models.transformer import Transformer

Init = Literal["random", "teacher_attention", "teacher_blocks"]


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Sizes of a student, and how its ``layer_mean`` is computed; its width and norm_eps are the encoder's.

    Raises:
        ValueError: A size is out of range, or ``normalization`` is unknown.
    """

    depth: int = 5
    mlp_ratio: float = 3.0
    num_heads: int = 12
    num_alibi_heads: int = 12
    """0: no ALiBi."""
    normalization: Normalization = "instance"
    """Normalization of each layer in the prediction and in ``layer_mean``."""

    def __post_init__(self) -> None:
        check_whole("student depth", self.depth, 1, MAX_DEPTH)
        check_whole("student num_heads", self.num_heads, 1, MAX_WIDTH)
        check_whole("student num_alibi_heads", self.num_alibi_heads, 0, self.num_heads)
        check_choice("student normalization", self.normalization, Normalization)


class Student(Transformer):
    """The student. Only ``blocks`` train; the encoder is the teacher's, frozen.

    Args:
        encoder: Shared with the teacher.
        config: Sizes.
        provenance: Origin of teacher and student, stored in exported files.

    Raises:
        ValueError: The sizes do not fit the encoder's.
    """

    def __init__(self, encoder: Encoder, config: StudentConfig, provenance: dict[str, Any] | None = None) -> None:
        dim, norm_eps = encoder.config.embed_dim, encoder.config.norm_eps
        check_number("mlp_ratio", config.mlp_ratio, 1 / dim, MAX_WIDTH / dim)
        hidden_dim = int(dim * config.mlp_ratio)
        if dim % config.num_heads:
            raise ValueError(f"student num_heads must divide the width {dim}, got {config.num_heads}")
        kinds = [Block if encoder.config.is_normalized else EntranceBlock] + [Block] * (config.depth - 1)
        blocks = [kind(dim, config.num_heads, hidden_dim, norm_eps) for kind in kinds]
        super().__init__(encoder, blocks, config.normalization)
        self.config = config
        self.provenance = provenance or {}
        self.alibi = build_alibi(encoder.config, config.num_heads, config.num_alibi_heads)
        init_linear_layers(self.blocks)

    @property
    def block_list(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def block_contexts(self, x_BTD: Tensor) -> list[Tensor | None]:
        return [None if self.alibi is None else self.alibi(x_BTD)] * len(self.blocks)

    def backward_macs(self) -> int:
        """Return the backward pass's multiply-accumulates: twice the forward's, less the gradient of the input."""
        first = self.block_list[0]
        first_qkv = 0 if isinstance(first, EntranceBlock) else first.attn.qkv.weight.numel()
        return 2 * self.forward_macs() - self.encoder.config.num_tokens * first_qkv


@torch.no_grad()
def init_from_teacher(student: Student, sources: Sequence[nn.Module], init: Init) -> None:
    """Copy a teacher's first blocks into the student's.

    Args:
        student: Changed in place.
        sources: For ``teacher_attention`` each block's attention, for ``teacher_blocks`` the blocks; of the student's
            kind.
        init: One of these two.

    Raises:
        ValueError: The teacher has too few blocks, or blocks of other sizes.
    """
    if len(student.blocks) > len(sources):
        raise ValueError(f"init {init}: the student has {len(student.blocks)} blocks, the teacher {len(sources)}")
    for block, source in zip(student.block_list, sources, strict=False):
        target: nn.Module = block.attn if init == "teacher_attention" else block
        for name, tensor in target.named_parameters():
            shape, source_shape = tuple(tensor.shape), tuple(source.get_parameter(name).shape)
            if shape != source_shape:
                raise ValueError(
                    f"init {init} needs the teacher's sizes: {name} {shape} against the teacher's {source_shape}"
                )
        target.load_state_dict(source.state_dict())
