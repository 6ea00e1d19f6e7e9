"""Blocks that return their FFN outputs, and the post-norm one of data2vec 2.0.

:class:`Block` is fairseq's ``AltBlock`` with ``layer_norm_first=False``; parameter names are fairseq's, so that weights
load from a plain dict.
Shapes: B images, T time steps, D channels, H heads, K = D/H channels of a head.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["SHORT_SEQUENCE", "Attention", "Block", "EntranceBlock", "FfnBlock", "Mlp", "init_linear_layers"]

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
