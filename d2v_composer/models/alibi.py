"""Attention with linear biases, as data2vec 2.0 computes it (ALiBi: Press et al. 2022, arXiv:2108.12409).

Shapes: B inputs, H heads, N patches or positions, E extra tokens, T = E + N time steps.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["Alibi", "absolute_distance", "alibi_slopes", "compute_dtype", "manhattan_distance", "mask_padding"]

# The memory-efficient attention kernels want rows whose strides divide by eight, and otherwise pad at every call.
ROW_ALIGNMENT = 8
# How many shapes' biases are kept: images have one, text may have another length in every batch.
MAX_KEPT = 8


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
    """Steps from patch to patch on the √N × √N grid of an image, (N, N).

    Raises:
        ValueError: N is no square.
    """
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(f"2-D ALiBi needs a square grid of patches, got {num_patches} patches")
    index = torch.arange(num_patches)
    row, column = index // side, index % side
    return ((row[:, None] - row).abs() + (column[:, None] - column).abs()).float()


def absolute_distance(num_positions: int) -> Tensor:
    """|i - j| in a sequence such as text or audio, (N, N)."""
    index = torch.arange(num_positions)
    return (index[:, None] - index).abs().float()


class Alibi(nn.Module):
    """What is added to the attention scores: -slope · distance, and 0 for extra tokens.

    Built once for each length, dtype and device, (1, H, T, T): one for the whole batch, which attention broadcasts
    without a copy, without gradient, with rows as the kernels want them.

    Args:
        distance: N → (N, N): :func:`manhattan_distance` or :func:`absolute_distance`.
        num_heads: H; the heads from ``num_alibi_heads`` on have no bias.
        num_alibi_heads: The heads that have one; their slopes are those of a model with so many heads.
        num_extra_tokens: E; their rows and columns stand in front of the patches'.
    """

    def __init__(
        self, distance: Callable[[int], Tensor], *, num_heads: int, num_alibi_heads: int, num_extra_tokens: int
    ) -> None:
        super().__init__()
        self.distance = distance
        self.num_heads = num_heads
        self.num_alibi_heads = num_alibi_heads
        self.num_extra_tokens = num_extra_tokens
        # No buffers: they follow from the sizes, and have no business in a checkpoint.
        self.kept: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def forward(self, num_steps: int, dtype: torch.dtype, device: torch.device, scale: Tensor | None = None) -> Tensor:
        """The bias, (1, H, T, T).

        Args:
            num_steps: T.
            dtype: What the attention computes in, see :func:`compute_dtype`.
            device: Where.
            scale: ``None`` for 1, or a layer's factors, (1, H or fewer, 1, 1); negative ones count as 0.
        """
        if scale is not None:
            return aligned(self.unscaled(num_steps, torch.float32, device) * self._every_heads(scale), dtype)
        return self.unscaled(num_steps, dtype, device)

    def unscaled(self, num_steps: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The bias itself, the same tensor at every call."""
        key = (num_steps, dtype, device)
        if key not in self.kept:
            if len(self.kept) == MAX_KEPT:
                del self.kept[next(iter(self.kept))]
            with torch.inference_mode(False):  # an evaluation may come first, and training could not use what it made
                self.kept[key] = aligned(self.build(num_steps).to(device), dtype)
        return self.kept[key]

    def build(self, num_steps: int) -> Tensor:
        """Compute it, (1, H, T, T) float32 on the CPU."""
        bias_HTT = torch.zeros(self.num_heads, num_steps, num_steps)
        slopes = alibi_slopes(self.num_alibi_heads)[:, None, None]
        extra = self.num_extra_tokens
        bias_HTT[: self.num_alibi_heads, extra:, extra:] = -slopes * self.distance(num_steps - extra)
        return bias_HTT[None]

    def _every_heads(self, scale: Tensor) -> Tensor:
        """The factors of all heads; those past the scale's have no bias anyway."""
        missing_heads = self.num_heads - scale.shape[1] if scale.shape[1] > 1 else 0
        return nn.functional.pad(scale.clamp(min=0), (0, 0, 0, 0, 0, missing_heads))


def mask_padding(bias: Tensor | None, padding_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias of a batch whose inputs differ in length: no time step attends to padding.

    Args:
        bias: (1, H, T, T), or ``None``.
        padding_mask: (B, T) bool, true for padding; in no row all of it.
        dtype: What the attention computes in.

    Returns:
        (B, 1, 1, T) without a bias; with one (B, H, T, T), made once for all layers of the batch: no kernel takes the
        two apart.
    """
    mask = torch.zeros_like(padding_mask, dtype=dtype).masked_fill(padding_mask, -torch.inf)[:, None, None]
    return aligned(mask if bias is None else bias + mask, dtype)


def aligned(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The same values in ``dtype``, in rows whose stride the attention kernels take as it is."""
    num_steps = bias.shape[-1]
    padding = -num_steps % ROW_ALIGNMENT
    return nn.functional.pad(bias.to(dtype), (0, padding))[..., :num_steps]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that linear layers and attention compute in when given ``x``: autocast's, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
