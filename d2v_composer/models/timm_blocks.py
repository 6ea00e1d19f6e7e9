"""Wrap timm's blocks to return their FFN outputs, and hold their contexts: rotary positions, or BEiT's relative bias.

Contexts are constants of a frozen model at one image size, and computed once.
Shapes: T tokens, L blocks, H heads.
"""

from typing import Any, NamedTuple

import torch
from timm.models import Beit, beit, eva, vision_transformer
from torch import Tensor, nn
from typing_extensions import Self

from d2v_composer.models.attention import FfnBlock, autocast_dtype, pad_rows


class Kind(NamedTuple):
    """How a class of timm's blocks differs from the others."""

    context: str = ""
    """Name of the attention's argument that takes the context; empty if it takes none."""
    is_post_norm: bool = False
    """True if each branch ends with its LayerNorm, before the residual sum."""
    scale: str = "gamma_{}"
    """Attribute with the LayerScale of branch 1 or 2: a parameter, a module, or ``None``."""


KINDS: dict[type[nn.Module], Kind] = {
    vision_transformer.Block: Kind(scale="ls{}"),
    vision_transformer.ResPostBlock: Kind(is_post_norm=True),
    eva.EvaBlock: Kind("rope"),
    eva.EvaBlockPostNorm: Kind("rope", is_post_norm=True),
    beit.Block: Kind("shared_rel_pos_bias"),
}


def check_block(block: nn.Module) -> None:
    """Raise ValueError if a block's class is not supported."""
    if type(block) not in KINDS:
        allowed = ", ".join(sorted({kind.__name__ for kind in KINDS}))
        raise ValueError(f"blocks of class {type(block).__name__} are not supported; expected one of {allowed}")


@torch.no_grad()
def fuse_biases(attention: Any) -> None:
    """Join the biases of queries, keys and values once; timm joins them at every call."""
    if getattr(attention, "q_bias", None) is not None:
        joined = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        attention.qkv.bias = nn.Parameter(joined, requires_grad=False)
        attention.q_bias = attention.k_bias = attention.v_bias = None


class TimmBlock(FfnBlock):
    """A timm block: attention branch, then MLP branch, each added to the residual stream.

    The FFN output is what the MLP branch adds, after LayerScale. The block calls timm's own submodules, because hooks
    on them would break torch.compile.

    Args:
        block: A block of a supported kind.
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
            attended_BTD = (x_BTD + block.norm1(block.attn(x_BTD, **arguments))).to(x_BTD.dtype)
            ffn_output_BTD = block.norm2(block.mlp(attended_BTD))
        else:
            attended_BTD = (x_BTD + self.scale(1, block.attn(block.norm1(x_BTD), **arguments))).to(x_BTD.dtype)
            ffn_output_BTD = self.scale(2, block.mlp(block.norm2(attended_BTD)))
        return (attended_BTD + ffn_output_BTD).to(x_BTD.dtype) if needs_output else None, ffn_output_BTD

    def scale(self, branch: int, x_BTD: Tensor) -> Tensor:
        """Apply the LayerScale of a branch, if it has one."""
        scale = getattr(self.block, self.kind.scale.format(branch))
        if scale is None:
            return x_BTD
        return scale(x_BTD) if isinstance(scale, nn.Module) else scale * x_BTD


class FixedContexts(nn.Module):
    """The contexts of blocks, in a buffer that moves with the model and is stored in exported files.

    Args:
        table: One context for all blocks, (1, …), or one for each, (L, …); ``None`` if blocks need none.
        num_blocks: Number of blocks, L.
    """

    table: Tensor | None

    def __init__(self, table: Tensor | None, num_blocks: int) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        self.register_buffer("table", table if num_blocks else None)

    def of_blocks(self, start: int, stop: int) -> Self:
        """Return the contexts of blocks ``start`` to ``stop - 1``."""
        table = self.table
        if table is not None:
            table = (table if len(table) == 1 else table[start:stop]).clone()
        return type(self)(table, stop - start)

    def forward(self, x_BTD: Tensor) -> list[Tensor | None]:
        """Return the context of each block for an input."""
        if self.table is None:
            return [None] * self.num_blocks
        contexts: list[Tensor | None] = list(self.select(self.table, x_BTD))
        return contexts * self.num_blocks if len(contexts) == 1 else contexts

    def select(self, table: Tensor, x_BTD: Tensor) -> Tensor:
        """Return the table with a first axis of blocks, (1 or L, …)."""
        return table


class RelativeBias(FixedContexts):
    """Biases of the attention scores, (1 or L, 1, H, T, T); the table's rows are padded as the kernels require."""

    is_cast = True  # the attention computes in that dtype

    def select(self, table: Tensor, x_BTD: Tensor) -> Tensor:
        return table.to(autocast_dtype(x_BTD))[..., : table.shape[-2]]


@torch.no_grad()
def take_contexts(model: Any) -> FixedContexts:
    """Remove the contexts of all blocks from a model, and return them."""
    num_blocks = len(model.blocks)
    if isinstance(model, Beit):
        return RelativeBias(take_relative_bias(model), num_blocks)
    rope: Any = getattr(model, "rope", None)
    if rope is None:
        return FixedContexts(None, num_blocks)
    model.rope = None
    table = rope.get_embed(shape=model.patch_embed.grid_size)
    return FixedContexts(table if model.rope_mixed else table[None], num_blocks)


def take_relative_bias(model: Any) -> Tensor | None:
    """Remove the relative biases from a model, and return each block's own with the shared one added, if it has any."""
    attentions = [block.attn for block in model.blocks if block.attn.relative_position_bias_table is not None]
    biases = [gather(attention) for attention in attentions]
    if model.rel_pos_bias is not None:
        shared = gather(model.rel_pos_bias)
        biases = [bias + shared for bias in biases] or [shared]
        model.rel_pos_bias = None
    for attention in attentions:
        attention.relative_position_bias_table = attention.relative_position_index = None
    return pad_rows(torch.stack(biases)) if biases else None


def gather(part: Any) -> Tensor:
    """Return the bias of each pair of tokens, (1, H, T, T)."""
    return part.relative_position_bias_table[part.relative_position_index].permute(2, 0, 1)[None]
