"""Contexts of a timm ViT's blocks, beside their input: rotary positions, or BEiT's relative bias.

They are constants of a frozen model at one image size, and computed once.
Shapes: T time steps, L blocks, H heads.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.models import Beit
from torch import Tensor, nn
from typing_extensions import Self

from d2v_composer.models.alibi import autocast_dtype, pad_rows

__all__ = ["FixedContexts", "RelativeBias", "take_contexts"]


class FixedContexts(nn.Module):
    """The contexts of some blocks, as a buffer that moves with the model and is stored in exported files.

    Args:
        table: (1 or L, …): one context for all blocks, or one for each; ``None``: they need none.
        num_blocks: L.
    """

    table: Tensor | None

    def __init__(self, table: Tensor | None, num_blocks: int) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        self.register_buffer("table", table if num_blocks else None)

    def of_blocks(self, start: int, stop: int) -> Self:
        """Return the contexts of blocks from ``start`` to before ``stop``."""
        if self.table is None:
            return type(self)(None, stop - start)
        return type(self)((self.table if len(self.table) == 1 else self.table[start:stop]).clone(), stop - start)

    def forward(self, x_BTD: Tensor) -> list[Tensor | None]:
        """Return the context of each block for an input."""
        if self.table is None:
            return [None] * self.num_blocks
        contexts: list[Tensor | None] = list(self.select(self.table, x_BTD))
        return contexts * self.num_blocks if len(contexts) == 1 else contexts

    def select(self, table: Tensor, x_BTD: Tensor) -> Tensor:
        """Return the table as blocks take it, (1 or L, …)."""
        return table


class RelativeBias(FixedContexts):
    """Biases of the attention scores, (1 or L, 1, H, T, T); the table's rows are padded as the kernels need them.

    Args:
        table: As for :class:`FixedContexts`. Its copy in another dtype is kept, until it moves or is loaded.
        num_blocks: L.
    """

    def __init__(self, table: Tensor | None, num_blocks: int) -> None:
        super().__init__(table, num_blocks)
        self.cast: Tensor | None = None
        self.register_load_state_dict_post_hook(forget_cast)

    def select(self, table: Tensor, x_BTD: Tensor) -> Tensor:
        dtype = autocast_dtype(x_BTD)
        if table.dtype != dtype:
            if self.cast is None or self.cast.dtype != dtype:
                with torch.inference_mode(False):  # training cannot use a tensor from an evaluation's inference mode
                    self.cast = table.to(dtype)
            table = self.cast
        return table[..., : table.shape[-2]]

    def reset_parameters(self) -> None:
        """Set the learned biases to 0."""
        if self.table is not None:
            self.table.zero_()
        self.cast = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.cast = None
        return super()._apply(fn, recurse)


def forget_cast(contexts: RelativeBias, incompatible_keys: Any) -> None:
    """Forget the copy of a table that is replaced."""
    contexts.cast = None


@torch.no_grad()
def take_contexts(model: Any) -> FixedContexts:
    """Take the contexts of all blocks out of a model, which is changed."""
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
    """Gather each block's own bias, and add the one that all share."""
    own = [block.attn for block in model.blocks if block.attn.relative_position_bias_table is not None]
    biases = [gather(attention) for attention in own]
    if model.rel_pos_bias is not None:
        shared = gather(model.rel_pos_bias)
        biases = [bias + shared for bias in biases] or [shared]
        model.rel_pos_bias = None
    for attention in own:
        attention.relative_position_bias_table = attention.relative_position_index = None
    return pad_rows(torch.stack(biases)) if biases else None


def gather(part: Any) -> Tensor:
    """Return the bias of each pair of time steps, (1, H, T, T)."""
    return part.relative_position_bias_table[part.relative_position_index].permute(2, 0, 1)[None]
