"""The student: a few trainable blocks on the teacher's frozen encoder.

Shapes: B images, T tokens, D channels.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from d2v_composer.models.attention import Block, init_linear_layers
from d2v_composer.models.encoder import Encoder, build_alibi
from d2v_composer.models.sizes import MAX_DEPTH, MAX_WIDTH, check_choice, check_number, check_whole
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

    def __post_init__(self) -> None:
        check_whole("student depth", self.depth, 1, MAX_DEPTH)
        if type(self.alibi) is not bool:
            raise ValueError("student alibi must be true or false")
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
        dim, num_heads, norm_eps = encoder.config.embed_dim, encoder.config.num_heads, encoder.config.norm_eps
        check_number("mlp_ratio", config.mlp_ratio, 1 / dim, MAX_WIDTH / dim)
        hidden_dim = int(dim * config.mlp_ratio)
        has_entrance = not encoder.config.is_normalized
        blocks = [
            Block(dim, num_heads, hidden_dim, norm_eps, has_entrance and number == 0) for number in range(config.depth)
        ]
        super().__init__(encoder, blocks, config.normalization)
        self.config = config
        self.provenance = provenance or {}
        self.alibi = build_alibi(encoder.config, num_heads, num_heads if config.alibi else 0)
        init_linear_layers(self.blocks)

    def block_contexts(self, x_BTD: Tensor) -> list[Tensor | None]:
        return [None if self.alibi is None else self.alibi(x_BTD)] * len(self.blocks)

    def backward_macs(self) -> int:
        """Return the backward pass's multiply-accumulates: twice the forward's, less the gradient of the input."""
        first = self.block_list[0]
        first_qkv = first.attn.qkv.weight.numel() if first.norm0 is None else 0
        return 2 * self.forward_macs() - self.encoder.config.num_tokens * first_qkv
