"""A teacher from timm: any of its VisionTransformer, Eva and Beit models.

Shapes: B images, T time steps, D channels, L blocks.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from d2v_composer.models.student import Init
from d2v_composer.models.teacher import Teacher
from d2v_composer.models.timm_block import TimmBlock
from d2v_composer.models.timm_config import TimmTeacherConfig
from d2v_composer.models.timm_contexts import RelativeBias
from d2v_composer.models.timm_encoder import TimmEncoder, TimmParts, encoder_config

__all__ = ["TimmTeacher", "teacher_config"]

ATTENTION_TENSORS = "proj.bias, proj.weight, qkv.bias, qkv.weight"
"""Of a student's attention."""


def teacher_config(model: str, built: Any, first_blocks: int | None = None) -> TimmTeacherConfig:
    """Return the sizes of a built model.

    Args:
        model: ``timm/NAME``.
        built: The model.
        first_blocks: Blocks in the encoder; default a sixth of all, as in data2vec 2.0 base.

    Raises:
        ValueError: ``first_blocks`` leaves no block to the teacher.
    """
    num_blocks = len(built.blocks)
    first_blocks = round(num_blocks / 6) if first_blocks is None else first_blocks
    encoder = encoder_config(model, built, first_blocks)
    return TimmTeacherConfig(**vars(encoder), depth=num_blocks - first_blocks)


class TimmTeacher(Teacher):
    """The teacher, frozen and in eval mode.

    Args:
        model: timm's model with its weights; it is taken apart.
        config: Its sizes.
        provenance: Origin of the weights, stored with what is derived from them.
    """

    config: TimmTeacherConfig

    def __init__(self, model: nn.Module, config: TimmTeacherConfig, provenance: dict[str, Any] | None = None) -> None:
        parts = TimmParts.of(model)
        first, num_blocks = config.first_blocks, len(parts.blocks)
        super().__init__(TimmEncoder(config.encoder_config(), parts), parts.blocks[first:], config, provenance)
        self.contexts = parts.contexts.of_blocks(first, num_blocks)
        self.norm = parts.norm
        self.freeze()

    def cast_weights(self, dtype: torch.dtype) -> Self:
        """Cast relative biases too: the attention computes in this dtype."""
        for part in self.modules():
            if isinstance(part, RelativeBias):
                part.to(dtype)
        return super().cast_weights(dtype)

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """Make the final norm a unit too; a root stays gathered."""
        return super().fsdp_wrap_fn(module) or (module is self.norm and any(True for _ in module.parameters()))

    @property
    def block_list(self) -> list[TimmBlock]:
        return cast("list[TimmBlock]", list(self.blocks))

    def block_contexts(self, x_BTD: Tensor) -> list[Tensor | None]:
        return self.contexts(x_BTD)

    def mask_padding(
        self, contexts: list[Tensor | None], padding_mask_BT: Tensor, dtype: torch.dtype
    ) -> list[Tensor | None]:
        raise ValueError("a timm teacher takes no padding mask: images have no padding")

    def forward_blocks(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Return what timm's ``forward_features`` gives, with the final norm, and every FFN output, (B, T, D) each."""
        output_BTD, ffn_outputs = super().forward_blocks(x, padding_mask)
        return self.norm(output_BTD), ffn_outputs

    def init_sources(self, init: Init) -> Sequence[nn.Module]:
        blocks, name = [block.block for block in self.block_list], self.config.model
        if init == "teacher_blocks":
            kind = type(blocks[0]).__name__
            raise ValueError(f"init teacher_blocks needs data2vec 2.0's post-norm blocks, {name} has {kind}")
        attentions = [block.attn for block in blocks]
        found = ", ".join(sorted(parameter for parameter, _ in attentions[0].named_parameters()))
        if found != ATTENTION_TENSORS or self.contexts.table is not None:
            raise ValueError(
                f"init teacher_attention needs an attention of {ATTENTION_TENSORS} without rotary positions or "
                f"relative bias, {name} has {type(attentions[0]).__name__} of {found}"
            )
        return attentions
