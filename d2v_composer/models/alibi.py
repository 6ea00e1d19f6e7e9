"""Attention with linear biases (ALiBi) as in data2vec 2.0 (Press et al. 2022, arXiv:2108.12409).

Shapes: B inputs, H heads, N patches or positions, E extra tokens, T = E + N time steps.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = [
    "Alibi",
    "absolute_distance",
    "alibi_slopes",
    "autocast_dtype",
    "manhattan_distance",
    "mask_padding",
    "pad_rows",
]

# The memory-efficient attention kernels need row strides that divide by eight, and otherwise pad at every call.
ROW_ALIGNMENT = 8
# Number of cached biases. Images need one; batches of text may all differ in length.
MAX_KEPT = 8


def alibi_slopes(num_heads: int) -> Tensor:
    """Return the slope of each head, (H,).

    For a power of two, a geometric series from 2^(-8/H); otherwise the series of the next lower power of two P,
    followed by every second slope of 2P.
    """

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (head + 1) / count) for head in range(count)]

    lower_power = 2 ** math.floor(math.log2(num_heads))
    missing = num_heads - lower_power
    return torch.tensor(geometric(lower_power) + geometric(2 * lower_power)[::2][:missing])


def manhattan_distance(num_patches: int, num_columns: int) -> Tensor:
    """Return the Manhattan distances between patches on an image's grid, (N, N).

    Args:
        num_patches: N.
        num_columns: Patches in a row.

    Raises:
        ValueError: N patches do not fill such a grid.
    """
    if num_patches % num_columns:
        raise ValueError(f"2-D ALiBi needs full rows of {num_columns} patches, got {num_patches} patches")
    index_N = torch.arange(num_patches)
    row_N, column_N = index_N // num_columns, index_N % num_columns
    return ((row_N[:, None] - row_N).abs() + (column_N[:, None] - column_N).abs()).float()


def absolute_distance(num_positions: int) -> Tensor:
    """Return |i - j| for a sequence such as text or audio, (N, N)."""
    index_N = torch.arange(num_positions)
    return (index_N[:, None] - index_N).abs().float()


class Alibi(nn.Module):
    """Bias added to the attention scores: -slope · distance, and 0 for extra tokens.

    Cached by length, dtype and device as (1, H, T, T), without gradient and with rows aligned for the kernels.
    Attention broadcasts it over the batch without a copy.

    Args:
        distance: N → (N, N): :func:`manhattan_distance` or :func:`absolute_distance`.
        num_heads: H; heads from ``num_alibi_heads`` on have no bias.
        num_alibi_heads: Heads with a bias; their slopes are those of a model with this many heads.
        num_extra_tokens: E; they precede the patches.
    """

    def __init__(
        self, distance: Callable[[int], Tensor], *, num_heads: int, num_alibi_heads: int, num_extra_tokens: int
    ) -> None:
        super().__init__()
        self.distance = distance
        self.num_heads = num_heads
        self.num_alibi_heads = num_alibi_heads
        self.num_extra_tokens = num_extra_tokens
        # Not buffers: the sizes determine them, so checkpoints need not hold them.
        self.kept: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def forward(self, num_steps: int, dtype: torch.dtype, device: torch.device, scale: Tensor | None = None) -> Tensor:
        """Return the bias, (1, H, T, T).

        Args:
            num_steps: T.
            dtype: The attention's, see :func:`autocast_dtype`.
            device: The attention's.
            scale: One layer's factors, (1, H or fewer, 1, 1), clamped at 0; ``None`` for 1.
        """
        if scale is None:
            return self.unscaled(num_steps, dtype, device)
        return aligned(self.unscaled(num_steps, torch.float32, device) * self._of_all_heads(scale), dtype)

    def unscaled(self, num_steps: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the bias with a scale of 1, the same tensor at every call."""
        key = (num_steps, dtype, device)
        if key not in self.kept:
            if len(self.kept) == MAX_KEPT:
                del self.kept[next(iter(self.kept))]
            with torch.inference_mode(False):  # training cannot use a tensor from an evaluation's inference mode
                self.kept[key] = aligned(self.build(num_steps).to(device), dtype)
        return self.kept[key]

    def build(self, num_steps: int) -> Tensor:
        """Compute the bias, (1, H, T, T) float32 on the CPU."""
        bias_HTT = torch.zeros(self.num_heads, num_steps, num_steps)
        slopes_H11 = alibi_slopes(self.num_alibi_heads)[:, None, None]
        extra = self.num_extra_tokens
        bias_HTT[: self.num_alibi_heads, extra:, extra:] = -slopes_H11 * self.distance(num_steps - extra)
        return bias_HTT[None]

    def _of_all_heads(self, scale: Tensor) -> Tensor:
        """Pad per-head factors to all heads; the added heads have no bias to scale."""
        missing_heads = self.num_heads - scale.shape[1] if scale.shape[1] > 1 else 0
        return nn.functional.pad(scale.clamp(min=0), (0, 0, 0, 0, 0, missing_heads))


def mask_padding(bias: Tensor | None, padding_mask_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a bias with which no time step attends to padding, for inputs of different lengths.

    Args:
        bias: (1, H, T, T), or ``None``.
        padding_mask_BT: bool, true for padding; each row needs a time step that is not.
        dtype: The attention's.

    Returns:
        (B, 1, 1, T) without a bias, (B, H, T, T) with one, computed once for all layers: kernels take one tensor.
    """
    mask = torch.zeros_like(padding_mask_BT, dtype=dtype).masked_fill(padding_mask_BT, -torch.inf)[:, None, None]
    return aligned(mask if bias is None else bias + mask, dtype)


def aligned(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bias in ``dtype`` with rows aligned for the attention kernels."""
    return pad_rows(bias.to(dtype))[..., : bias.shape[-1]]


def pad_rows(bias: Tensor) -> Tensor:
    """Append zeros to the rows until the attention kernels' alignment divides their length."""
    return nn.functional.pad(bias, (0, -bias.shape[-1] % ROW_ALIGNMENT))


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which linear layers and attention compute on ``x``: autocast's if enabled, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
