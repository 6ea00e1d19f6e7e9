"""Attention with linear biases, as data2vec 2.0 computes it for images (ALiBi: Press et al. 2022, arXiv:2108.12409).

Shapes: H heads, N patches, E extra tokens, T = E + N time steps, L layers.
"""

import math

import torch
from torch import Tensor, nn

__all__ = ["Alibi", "alibi_bias", "alibi_slopes", "compute_dtype", "manhattan_distance"]

# The memory-efficient attention kernels want rows whose strides divide by eight, and otherwise pad at every call.
ROW_ALIGNMENT = 8


def alibi_slopes(num_heads: int) -> Tensor:
    """The slope of each head, (H,).

    A geometric series from 2^(-8/H) for a power of two; otherwise the series of the next lower power of two P,
    followed by every second slope of 2P.
    """

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (head + 1) / count) for head in range(count)]

    lower_power = 2 ** math.floor(math.log2(num_heads))
    missing = num_heads - lower_power
    return torch.tensor(geometric(lower_power) + geometric(2 * lower_power)[::2][:missing])


def manhattan_distance(num_patches: int) -> Tensor:
    """Steps from patch to patch on the √N × √N grid, (N, N)."""
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(f"2-D ALiBi needs a square grid of patches, got {num_patches} patches")
    index = torch.arange(num_patches)
    row, column = index // side, index % side
    return ((row[:, None] - row).abs() + (column[:, None] - column).abs()).float()


def alibi_bias(distance: Tensor, *, num_heads: int, num_alibi_heads: int, num_extra_tokens: int) -> Tensor:
    """What is added to the attention scores, (H, T, T): -slope · distance, and 0 for extra tokens.

    Args:
        distance: (N, N), see :func:`manhattan_distance`.
        num_heads: H; the heads from ``num_alibi_heads`` on have no bias.
        num_alibi_heads: The heads that have one; their slopes are those of a model with so many heads.
        num_extra_tokens: E; their rows and columns stand in front of the patches'.
    """
    num_steps = num_extra_tokens + len(distance)
    bias_HTT = torch.zeros(num_heads, num_steps, num_steps)
    slopes = alibi_slopes(num_alibi_heads)[:, None, None]
    bias_HTT[:num_alibi_heads, num_extra_tokens:, num_extra_tokens:] = -slopes * distance
    return bias_HTT


class Alibi(nn.Module):
    """The ALiBi bias of a stack of blocks, built once, never expanded over the batch and without gradient.

    Args:
        bias: (H, T, T), see :func:`alibi_bias`.
    """

    bias: Tensor

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.num_steps = bias.shape[-1]
        padding = -self.num_steps % ROW_ALIGNMENT
        # Not persistent: it follows from the sizes, and has no business in a checkpoint.
        self.register_buffer("bias", nn.functional.pad(bias, (0, padding))[None], persistent=False)

    def forward(self, dtype: torch.dtype, num_layers: int, scale: Tensor | None = None) -> list[Tensor]:
        """The bias of each layer, L tensors (1, H, T, T) in ``dtype``.

        Args:
            dtype: What the attention computes in, see :func:`compute_dtype`.
            num_layers: L.
            scale: ``None`` for 1, or what multiplies the bias: (L or 1, 1, H or 1, 1, 1); negative values count as 0.
        """
        if scale is None:
            return [self._cut(self.bias, dtype)] * num_layers
        if len(scale) == 1:
            return [self._cut(self._scaled(scale[0]), dtype)] * num_layers
        return [self._cut(self._scaled(layer_scale), dtype) for layer_scale in scale]

    def _cut(self, bias: Tensor, dtype: torch.dtype) -> Tensor:
        return bias.to(dtype)[..., : self.num_steps]

    def _scaled(self, scale: Tensor) -> Tensor:
        """The bias times one layer's scale, (1, H or fewer, 1, 1); heads past the scale's have no bias anyway."""
        missing_heads = self.bias.shape[1] - scale.shape[1] if scale.shape[1] > 1 else 0
        padded_scale = nn.functional.pad(scale.clamp(min=0), (0, 0, 0, 0, 0, missing_heads))
        return self.bias * padded_scale


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that linear layers and attention compute in when given ``x``: autocast's, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
