"""The student: trainable blocks on an encoder.

Shapes: B inputs, T tokens, D channels of the encoder, d of a narrower student.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from d2v_composer.models.attention import Block, attention_bias, init_linear_layers
from d2v_composer.models.backbone import Transformer
from d2v_composer.models.configs import MAX_WIDTH, StudentConfig, check_whole
from d2v_composer.models.encoder import Encoder, build_alibi
from d2v_composer.models.provenance import Record

Init = Literal["random", "teacher_attention", "teacher_blocks"]


class Student(Transformer):
    """A student: trainable blocks on an encoder.

    Args:
        encoder: The encoder, which a teacher may share.
        config: Sizes.
        provenance: Origin of the teacher and the student.

    Attributes:
        input_proj: The linear layer from D to d channels; an Identity if the student is as wide as the encoder.

    Raises:
        ValueError: The sizes do not fit the encoder's.
    """

    def __init__(self, encoder: Encoder, config: StudentConfig, provenance: Record | None = None) -> None:
        width, norm_eps = encoder.config.embed_dim, encoder.config.norm_eps
        dim = width if config.embed_dim is None else config.embed_dim
        check_whole("student.embed_dim", dim, 1, width)
        most_heads = max(1, dim * encoder.config.num_heads // width)
        num_heads = next(number for number in range(most_heads, 0, -1) if dim % number == 0)
        hidden_dim = int(dim * config.mlp_ratio)
        check_whole("mlp_ratio x embed_dim", hidden_dim, 1, MAX_WIDTH)
        has_input_norm = not encoder.config.is_normalized
        blocks = [Block(dim, num_heads, hidden_dim, norm_eps, has_input_norm and i == 0) for i in range(config.depth)]
        super().__init__(encoder, blocks, config, provenance)
        self.embed_dim = dim
        self.alibi = build_alibi(encoder.config, num_heads, num_heads if config.alibi else 0)
        init_linear_layers(self.blocks)
        self.input_proj = init_linear_layers(nn.Linear(width, dim)) if dim < width else nn.Identity()

    def block_contexts(self, x_BTD: Tensor, padding_mask: Tensor | None = None) -> list[Tensor | None]:
        return [attention_bias(self.alibi, x_BTD, padding_mask)] * len(self.blocks)

    def iterate_blocks(
        self, x: Tensor, needs_last_output: bool = True, padding_mask: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        x = self.input_proj(x)
        if torch.is_autocast_enabled(x.device.type):  # the residual stream is float32
            x = x.float()
        return super().iterate_blocks(x, needs_last_output, padding_mask)
