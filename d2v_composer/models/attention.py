"""Blocks that return their FFN outputs, and the post-norm one of data2vec 2.0.

:class:`Block` is fairseq's ``AltBlock`` with ``layer_norm_first=False``; parameter names are fairseq's, so that weights
load from a plain dict.
Shapes: B images, T time steps, D channels, H heads, K = D/H channels of a head.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

# MERGED FROM d2v_composer/models/attention.py: Attention with linear biases (ALiBi) as in data2vec 2.0 (Press et

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


# Time steps up to which a CPU in bfloat16 is faster with two matrix products than with its fused kernel.
SHORT_SEQUENCE = 100


class FfnBlock(nn.Module, ABC):
    """A block of any kind that returns its FFN output."""

    @abstractmethod
    def forward(
        self, x_BTD: Tensor, context: Tensor | None = None, needs_output: bool = True, /
    ) -> tuple[Tensor | None, Tensor]:
        """Return the block's output and its FFN output, (B, T, D) each.

        Args:
            x_BTD: The block's input.
            context: The kind's own extra: an attention bias, or a table of rotary positions.
            needs_output: If false, the output is ``None``: of the last block, often only the FFN output is needed.
        """

    @property
    @abstractmethod
    def attention_width(self) -> int:
        """Channels of all heads together."""

    def forward_macs(self, num_steps: int) -> int:
        """Return the multiply-accumulates for one image of T time steps, in linear layers and attention."""
        linear = sum(layer.weight.numel() for layer in self.modules() if isinstance(layer, nn.Linear))
        return num_steps * linear + 2 * num_steps**2 * self.attention_width


class Attention(nn.Module):
    """Multi-head self-attention with a fused projection and an optional additive bias."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x_BTD: Tensor, bias: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x_BTD).unflatten(-1, (3, self.num_heads, -1))
        query_BHTK, key_BHTK, value_BHTK = qkv.permute(2, 0, 3, 1, 4)
        attended_BHTK = attend(query_BHTK, key_BHTK, value_BHTK, bias)
        return self.proj(attended_BHTK.transpose(1, 2).flatten(2))


def attend(query_BHTK: Tensor, key_BHTK: Tensor, value_BHTK: Tensor, bias: Tensor | None) -> Tensor:
    """Compute scaled_dot_product_attention, (B, H, T, K), with the fastest kernel of torch 2.7."""
    is_cheaper_in_parts = query_BHTK.requires_grad or query_BHTK.shape[-2] <= SHORT_SEQUENCE
    if is_cheaper_in_parts and query_BHTK.dtype == torch.bfloat16 and query_BHTK.device.type == "cpu":
        # Twice as fast, forward and backward, as the CPU's fused kernel in bfloat16. Without gradient a quarter faster
        # at 65 time steps, but slower at 197.
        scores_BHTT = (query_BHTK * query_BHTK.shape[-1] ** -0.5) @ key_BHTK.transpose(-2, -1)
        return (scores_BHTT if bias is None else scores_BHTT + bias).softmax(dim=-1) @ value_BHTK
    return scaled_dot_product_attention(query_BHTK, key_BHTK, value_BHTK, bias)


class Mlp(nn.Module):
    """Two linear layers around an exact (erf) GELU."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x_BTD)))


class Block(FfnBlock):
    """``a = norm1(x + attention(x)); t = mlp(a); x' = norm2(a + t)``; ``t`` is the FFN output."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_hidden_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.attn = Attention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.mlp = Mlp(embed_dim, mlp_hidden_dim)

    def forward(
        self, x_BTD: Tensor, bias: Tensor | None = None, needs_output: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        """Return ``(x', t)``, (B, T, D) each.

        Args:
            x_BTD: The block's input.
            bias: Added to the attention scores; (1 or B, 1 or H, 1 or T, T) in the projections' dtype.
            needs_output: If false, ``x'`` is ``None``.
        """
        attended_BTD = self.norm1(x_BTD + self.attn(x_BTD, bias))
        ffn_output_BTD = self.mlp(attended_BTD)
        return self.norm2(attended_BTD + ffn_output_BTD) if needs_output else None, ffn_output_BTD

    @property
    def attention_width(self) -> int:
        return self.attn.qkv.in_features


class EntranceBlock(Block):
    """A block behind a LayerNorm of its own, for an input whose scale has no bound: a pre-norm residual stream."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_hidden_dim: int, norm_eps: float) -> None:
        super().__init__(embed_dim, num_heads, mlp_hidden_dim, norm_eps)
        self.norm0 = nn.LayerNorm(embed_dim, eps=norm_eps)

    def forward(
        self, x_BTD: Tensor, bias: Tensor | None = None, needs_output: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        return super().forward(self.norm0(x_BTD), bias, needs_output)


def init_linear_layers(module: nn.Module) -> None:
    """Set every linear layer's weights to N(0, 0.02) and its biases to 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
