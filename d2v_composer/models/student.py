"""The student: a few trainable blocks on the teacher's frozen encoder.

Shapes: B inputs, T tokens, D channels of the encoder, d of a narrower student.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from d2v_composer.models.attention import Block, attention_bias, init_linear_layers, linear_weights
from d2v_composer.models.encoder import Encoder, build_alibi
from d2v_composer.models.sizes import MAX_DEPTH, MAX_WIDTH, check_choice, check_flag, check_number, check_whole
from d2v_composer.models.targets import Normalization
from d2v_composer.models.transformer import Transformer

Init = Literal["random", "teacher_attention", "teacher_blocks"]


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Sizes of a student, and how its ``layer_mean`` is computed; all other sizes are the encoder's.

    Raises:
        ValueError: A size is out of range, or ``normalization`` is unknown.
    """

    depth: int = 5
    mlp_ratio: float = 3.0
    alibi: bool = True
    normalization: Normalization = "instance"
    """Normalization of each layer in the prediction and in ``layer_mean``."""
    embed_dim: int | None = None
    """Channels of blocks and embeddings, at most the encoder's; default: the encoder's."""
    final_layer_norm: bool = True
    """End target, prediction and ``layer_mean`` with a LayerNorm."""

    def __post_init__(self) -> None:
        check_whole("student depth", self.depth, 1, MAX_DEPTH)
        for name in ("alibi", "final_layer_norm"):
            check_flag(f"student {name}", getattr(self, name))
        check_choice("student normalization", self.normalization, Normalization)


class Student(Transformer):
    """The student: the teacher's frozen encoder, and blocks that train.

    A student narrower than its encoder reads the tokens through a linear layer, ``entrance``. Its heads have at least
    as many channels as the encoder's, and there is at least one.

    Args:
        encoder: Shared with the teacher.
        config: Sizes.
        provenance: Origin of teacher and student, stored in exported files.

    Attributes:
        entrance: D → d; the identity at the encoder's width.
        exit: d → D, for the regression alone: a :class:`~d2v_composer.models.distillation.DistillationModel` adds it
            to a narrow student; checkpoints have it, exported files do not.

    Raises:
        ValueError: The sizes do not fit the encoder's.
    """

    def __init__(self, encoder: Encoder, config: StudentConfig, provenance: dict[str, Any] | None = None) -> None:
        width, norm_eps = encoder.config.embed_dim, encoder.config.norm_eps
        dim = width if config.embed_dim is None else config.embed_dim
        check_whole("student.embed_dim", dim, 1, width)
        most_heads = max(1, dim * encoder.config.num_heads // width)
        num_heads = next(number for number in range(most_heads, 0, -1) if dim % number == 0)
        check_number("mlp_ratio", config.mlp_ratio, 1 / dim, MAX_WIDTH / dim)
        hidden_dim = int(dim * config.mlp_ratio)
        has_entrance = not encoder.config.is_normalized
        blocks = [
            Block(dim, num_heads, hidden_dim, norm_eps, has_entrance and number == 0) for number in range(config.depth)
        ]
        super().__init__(encoder, blocks, config.normalization, config.final_layer_norm)
        self.config = config
        self.embed_dim = dim
        self.provenance = provenance or {}
        self.alibi = build_alibi(encoder.config, num_heads, num_heads if config.alibi else 0)
        init_linear_layers(self.blocks)
        self.entrance = init_linear_layers(nn.Linear(width, dim)) if dim < width else nn.Identity()
        self.exit: nn.Module = nn.Identity()

    def block_contexts(self, x_BTD: Tensor, padding_mask: Tensor | None = None) -> list[Tensor | None]:
        return [attention_bias(self.alibi, x_BTD, padding_mask)] * len(self.blocks)

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        is_ours = isinstance(module, nn.Linear) and module in (self.entrance, self.exit)
        return is_ours or super().fsdp_wrap_fn(module)

    def iterate_blocks(
        self, x: Tensor, needs_last_output: bool = True, padding_mask: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        x = self.entrance(x)
        if torch.is_autocast_enabled(x.device.type):  # the residual stream is float32; a weight may be gathered in half
            x = x.float()
        return super().iterate_blocks(x, needs_last_output, padding_mask)

    def forward_macs(self, shape: Sequence[int] | None = None) -> int:
        return super().forward_macs(shape) + self.encoder.num_tokens(shape) * linear_weights(self.entrance)

    def backward_macs(self, shape: Sequence[int] | None = None) -> int:
        """Return the backward pass's multiply-accumulates: twice the forward pass's, minus the input gradient's."""
        first = self.block_list[0]
        reads_input = linear_weights(self.entrance) or (first.norm0 is None and linear_weights(first.attn.qkv))
        return 2 * self.forward_macs(shape) - self.encoder.num_tokens(shape) * reads_input
