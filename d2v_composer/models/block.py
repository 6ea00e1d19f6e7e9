"""The post-norm transformer block of data2vec 2.0 (fairseq's ``AltBlock`` with ``layer_norm_first=False``).

Parameter names are fairseq's, so that weights load from a plain dict.
Shapes: B images, T time steps, D channels, H heads.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["Attention", "Block", "Mlp", "init_linear_layers"]


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection and an optional additive bias."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x_BTD: Tensor, bias: Tensor | None = None) -> Tensor:
        """``bias``: see :class:`Block`."""
        qkv = self.qkv(x_BTD).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D/H)
        attended = attend(query, key, value, bias)
        return self.proj(attended.transpose(1, 2).flatten(2))


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """scaled_dot_product_attention, (B, H, T, D/H), by the fastest way that torch 2.7 has."""
    if query.requires_grad and query.dtype == torch.bfloat16 and query.device.type == "cpu":
        # Written out, forward and backward take half the time of the CPU's fused kernel in bfloat16.
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        return (scores if bias is None else scores + bias).softmax(dim=-1) @ value
    return scaled_dot_product_attention(query, key, value, bias)


class Mlp(nn.Module):
    """Two linear layers around an exact (erf) GELU."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
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
        """``(x', t)``, (B, T, D) both.

        Args:
            x_BTD: The block's input.
            bias: Added to the attention scores; (1 or B, 1 or H, 1 or T, T) in the dtype that the projections compute
                in.
            needs_output: Whether anybody reads ``x'``; nobody does where the last block's FFN output is all that
                counts. Without, it is ``None``.
        """
        attended = self.norm1(x_BTD + self.attn(x_BTD, bias))
        ffn_output = self.mlp(attended)
        return self.norm2(attended + ffn_output) if needs_output else None, ffn_output

    def forward_macs(self, num_steps: int) -> int:
        """Multiply-accumulates of one image of ``num_steps`` time steps: the linear layers' and the attention's."""
        linear = sum(layer.weight.numel() for layer in self.modules() if isinstance(layer, nn.Linear))
        return num_steps * linear + 2 * num_steps**2 * self.attn.qkv.in_features


def init_linear_layers(module: nn.Module) -> None:
    """Weights ~ N(0, 0.02) and biases 0 in every linear layer; a LayerNorm starts as 1 and 0 by itself."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
