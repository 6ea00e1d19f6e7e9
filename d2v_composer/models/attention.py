"""The post-norm block of data2vec 2.0, the parts of the block, and linear attention biases (ALiBi).

Source: fairseq's ``AltBlock`` with ``layer_norm_first=False``; ALiBi: Press et al. 2022, arXiv:2108.12409.
Shapes: B inputs, E extra tokens, N patches or frames, T = E + N tokens, D channels, H heads, K = D/H channels per head.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

# Memory-efficient attention kernels need row strides that divide by eight. Otherwise they pad at every call.
ROW_ALIGNMENT = 8
# Tokens up to which a CPU in bfloat16 is faster with two matrix products than with its fused kernel.
SHORT_SEQUENCE = 100


def alibi_slopes(num_heads: int) -> Tensor:
    """Return the slope of each head, (H,).

    If H is a power of two, the slopes are the geometric series with first term and ratio 2^(-8/H). Otherwise, the first
    P slopes are the series for P, the next lower power of two; the remaining slopes are the first, third, fifth, … of
    the series for 2P.
    """

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (head + 1) / count) for head in range(count)]

    lower_power = 2 ** math.floor(math.log2(num_heads))
    missing = num_heads - lower_power
    return torch.tensor(geometric(lower_power) + geometric(2 * lower_power)[::2][:missing])


def manhattan_distance(index_N: Tensor, columns: int) -> Tensor:
    """Return the Manhattan distances, (N, N), between cells of a grid, given the cells' indices, row by row."""
    row_N, column_N = index_N // columns, index_N % columns
    return (row_N[:, None] - row_N).abs() + (column_N[:, None] - column_N).abs()


class Alibi(nn.Module):
    """Attention bias: -slope · Manhattan distance between patches or frames, and 0 for extra tokens.

    Args:
        num_columns: Number of columns in the grid of patches; 1 for a sequence of frames.
        num_heads: Number of heads, H.
        num_alibi_heads: Number of heads with a bias, which are the first heads.
        num_extra_tokens: Number of tokens before the patches or frames, E.
    """

    def __init__(self, num_columns: int, *, num_heads: int, num_alibi_heads: int, num_extra_tokens: int) -> None:
        super().__init__()
        self.num_columns = num_columns
        self.num_heads = num_heads
        self.num_alibi_heads = num_alibi_heads
        self.num_extra_tokens = num_extra_tokens
        # Not buffers: the sizes determine them, so checkpoints need not hold them.
        self.kept: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def forward(self, x_BTD: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return the bias, (1, H, T, T), in the dtype in which blocks compute attention on ``x_BTD``.

        Args:
            x_BTD: The blocks' input.
            scale: A layer's learned factors: (1, A, 1, 1) for A heads with a bias, or (1, 1, 1, 1) for all heads.
                Negative factors count as 0. ``None``: no factors.
        """
        dtype, num_tokens = autocast_dtype(x_BTD), x_BTD.shape[1]
        if scale is None:
            return self.unscaled(num_tokens, dtype, x_BTD.device)
        # Heads without a bias have no factor.
        missing_heads = self.num_heads - scale.shape[1] if scale.shape[1] > 1 else 0
        scale = pad(scale.clamp(min=0), (0, 0, 0, 0, 0, missing_heads))
        return aligned((self.unscaled(num_tokens, torch.float32, x_BTD.device) * scale).to(dtype))

    def unscaled(self, num_tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the bias without learned factors, (1, H, T, T)."""
        key = (dtype, device)
        longest = self.kept[key].shape[-1] if key in self.kept else 0
        if longest < num_tokens:
            # Longer than asked for from the second time on: each growth costs torch.compile its graphs.
            num_kept = max(num_tokens, 3 * longest // 2)
            with torch.inference_mode(False):  # training cannot use a tensor from an evaluation's inference mode
                self.kept[key] = aligned(self.build(num_kept).to(device, dtype))
        kept = self.kept[key]
        return kept if kept.shape[-1] == num_tokens else kept[..., :num_tokens, :num_tokens]

    def slopes(self) -> Tensor:
        """Return the slope of each head, (H,), with 0 for heads without a bias."""
        return pad(alibi_slopes(self.num_alibi_heads), (0, self.num_heads - self.num_alibi_heads))

    def build(self, num_tokens: int, slopes_H: Tensor | None = None) -> Tensor:
        """Compute the bias for T tokens, (1, H, T, T) float32, on the device of the slopes."""
        slopes_H = self.slopes() if slopes_H is None else slopes_H
        # Not arange: a program that torch.export writes would name the device.
        index_N = slopes_H.new_full((num_tokens - self.num_extra_tokens,), 1.0).cumsum(0) - 1
        distance_NN = manhattan_distance(index_N, self.num_columns)
        return pad(-slopes_H[:, None, None] * distance_NN, (self.num_extra_tokens, 0) * 2)[None]


def attention_bias(
    alibi: Alibi | None, x_BTD: Tensor, padding_mask: Tensor | None = None, scale: Tensor | None = None
) -> Tensor | None:
    """Return ALiBi's attention bias plus -inf for padded keys; ``None`` if ``alibi`` and ``padding_mask`` are ``None``.

    The bias broadcasts to (B, H, T, T).

    Args:
        alibi: The module that computes ALiBi's bias; ``None`` for no ALiBi.
        x_BTD: The blocks' input.
        padding_mask: (B, T), true for padding.
        scale: See :meth:`Alibi.forward`.
    """
    bias = None if alibi is None else alibi(x_BTD, scale)
    if padding_mask is None:
        return bias
    padding_BT = torch.zeros_like(padding_mask, dtype=autocast_dtype(x_BTD)).masked_fill(padding_mask, -math.inf)
    padding_B11T = pad_rows(padding_BT)[:, None, None]
    return (padding_B11T if bias is None else pad_rows(bias) + padding_B11T)[..., : x_BTD.shape[1]]


def aligned(bias: Tensor) -> Tensor:
    """Align the rows of a bias in memory for the attention kernels, unless the number of tokens is symbolic."""
    return bias if isinstance(bias.shape[-1], torch.SymInt) else pad_rows(bias)[..., : bias.shape[-1]]


def pad_rows(bias: Tensor) -> Tensor:
    """Pad the rows of a bias with zeros to a length that is a multiple of ``ROW_ALIGNMENT``."""
    return pad(bias, (0, -bias.shape[-1] % ROW_ALIGNMENT))


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which layers compute on ``x``: autocast's dtype if autocast is on, else ``x.dtype``."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class FfnBlock(nn.Module, ABC):
    """Base of blocks that return their output and their FFN output."""

    @abstractmethod
    def forward(
        self, x_BTD: Tensor, context: Tensor | None = None, needs_output: bool = True, /
    ) -> tuple[Tensor | None, Tensor]:
        """Return the block's output and its FFN output, (B, T, D) each.

        Args:
            x_BTD: The block's input.
            context: An attention bias that broadcasts to (B, H, T, T); or rotary positions; or ``None``.
            needs_output: If false, the block's output is ``None``.
        """


class Attention(nn.Module):
    """Multi-head self-attention with an optional additive bias."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x_BTD: Tensor, bias: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x_BTD).unflatten(-1, (3, self.num_heads, -1))
        query_BHTK, key_BHTK, value_BHTK = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended_BHTK = attend(query_BHTK, key_BHTK, value_BHTK, bias)
        return self.proj(attended_BHTK.transpose(1, 2).flatten(2))


def attend(query_BHTK: Tensor, key_BHTK: Tensor, value_BHTK: Tensor, bias: Tensor | None) -> Tensor:
    """Return scaled dot-product attention, (B, H, T, K)."""
    is_cpu_bf16 = query_BHTK.dtype == torch.bfloat16 and query_BHTK.device.type == "cpu"
    # Asked last, because a program exported in float32 takes sequences of any length.
    if is_cpu_bf16 and (query_BHTK.requires_grad or query_BHTK.shape[-2] <= SHORT_SEQUENCE):
        # Twice as fast, forward and backward, as the CPU's fused kernel in bfloat16. Without gradient a quarter faster
        # at 65 tokens, but slower at 197.
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
    """``a = norm1(x + attention(x)); t = mlp(a); x' = norm2(a + t)``, where ``t`` is the FFN output.

    With ``has_input_norm``, ``x`` is the block's input after a further LayerNorm.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, mlp_hidden_dim: int, norm_eps: float, has_input_norm: bool = False
    ) -> None:
        super().__init__()
        self.norm0 = nn.LayerNorm(embed_dim, eps=norm_eps) if has_input_norm else None
        self.norm1 = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.attn = Attention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.mlp = Mlp(embed_dim, mlp_hidden_dim)

    def forward(
        self, x_BTD: Tensor, context: Tensor | None = None, needs_output: bool = True, /
    ) -> tuple[Tensor | None, Tensor]:
        if self.norm0 is not None:
            x_BTD = self.norm0(x_BTD)
        attended_BTD = self.norm1(x_BTD + self.attn(x_BTD, context))
        ffn_output_BTD = self.mlp(attended_BTD)
        output_BTD = self.norm2(attended_BTD + ffn_output_BTD) if needs_output else None
        return output_BTD, ffn_output_BTD


def init_linear_layers(module: nn.Module) -> nn.Module:
    """Draw the weights of all linear layers from N(0, 0.02²), and set their biases to 0; return the module."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return module
