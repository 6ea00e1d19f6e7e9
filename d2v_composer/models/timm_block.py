"""timm's transformer blocks as blocks that return their FFN outputs.

Shapes: B images, T time steps, D channels.
"""

from typing import Any, NamedTuple

import torch
from timm.models import beit, eva, vision_transformer
from torch import Tensor, nn

from d2v_composer.models.block import FfnBlock

__all__ = ["TimmBlock", "check_block"]


class Kind(NamedTuple):
    """How a class of blocks is computed."""

    context: str = ""
    """The argument of its attention that takes the context; empty: there is none."""
    is_post_norm: bool = False
    """Each branch ends with its LayerNorm, before the residual sum."""
    scale: str = "gamma_{}"
    """The attribute with the LayerScale of branch 1 or 2: a parameter, a module, or ``None``."""


KINDS: dict[type[nn.Module], Kind] = {
    vision_transformer.Block: Kind(scale="ls{}"),
    vision_transformer.ResPostBlock: Kind(is_post_norm=True),
    eva.EvaBlock: Kind("rope"),
    eva.EvaBlockPostNorm: Kind("rope", is_post_norm=True),
    beit.Block: Kind("shared_rel_pos_bias"),
}


def check_block(block: nn.Module) -> None:
    """Check that a block has an FFN output.

    Raises:
        ValueError: Its kind is not supported.
    """
    if type(block) not in KINDS:
        allowed = ", ".join(sorted({kind.__name__ for kind in KINDS}))
        raise ValueError(f"blocks of kind {type(block).__name__} are not supported; supported are {allowed}")


@torch.no_grad()
def fuse_biases(attention: Any) -> None:
    """Give the projection one bias instead of those of queries, keys and values, which are joined at every call."""
    if getattr(attention, "q_bias", None) is not None:
        joined = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        attention.qkv.bias = nn.Parameter(joined, requires_grad=False)
        attention.q_bias = attention.k_bias = attention.v_bias = None


class TimmBlock(FfnBlock):
    """One of timm's blocks: attention branch, then MLP branch, each added to the residual stream.

    The FFN output is what the MLP branch adds, after LayerScale. It calls timm's own submodules: a hook on them would
    break torch.compile.

    Args:
        block: Of a supported kind.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        check_block(block)
        self.block: Any = block
        self.kind = KINDS[type(block)]
        fuse_biases(self.block.attn)

    def forward(
        self, x_BTD: Tensor, context: Tensor | None = None, needs_output: bool = True, /
    ) -> tuple[Tensor | None, Tensor]:
        block, arguments = self.block, {} if context is None else {self.kind.context: context}
        if self.kind.is_post_norm:
            x_BTD = x_BTD + block.norm1(block.attn(x_BTD, **arguments))
            ffn_output_BTD = block.norm2(block.mlp(x_BTD))
        else:
            x_BTD = x_BTD + self.scale(1, block.attn(block.norm1(x_BTD), **arguments))
            ffn_output_BTD = self.scale(2, block.mlp(block.norm2(x_BTD)))
        return x_BTD + ffn_output_BTD if needs_output else None, ffn_output_BTD

    def scale(self, branch: int, x_BTD: Tensor) -> Tensor:
        """Apply the LayerScale of a branch, if it has one."""
        scale = getattr(self.block, self.kind.scale.format(branch))
        if scale is None:
            return x_BTD
        return scale(x_BTD) if isinstance(scale, nn.Module) else scale * x_BTD

    @property
    def attention_width(self) -> int:
        return self.block.attn.proj.in_features
