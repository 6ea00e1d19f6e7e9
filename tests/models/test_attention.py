"""Attention: the ALiBi bias, its shape, and the kernels that take it."""

import copy
import re

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from d2v_composer.models.attention import SHORT_SEQUENCE, Alibi, Attention, Block, manhattan_distance
from d2v_composer.models.configs import ImageEncoderConfig


def build_alibi(columns: int, num_heads: int = 6, num_alibi_heads: int = 6, num_extra: int = 1) -> Alibi:
    heads = {"num_heads": num_heads, "num_alibi_heads": num_alibi_heads}
    return Alibi(columns, **heads, num_extra_tokens=num_extra)


def test_bias_is_the_distance_on_the_grid() -> None:
    assert manhattan_distance(torch.arange(9), 3)[0, 8] == 4  # corner to corner
    assert manhattan_distance(torch.arange(6), 3)[0].tolist() == [0, 1, 2, 1, 2, 3]
    bias = build_alibi(3, num_alibi_heads=4, num_extra=2)(torch.zeros(1, 11, 24))[0]
    assert bias.shape == (6, 11, 11)
    assert not bias[:, :2].any()
    assert not bias[:, :, :2].any()
    assert not bias[4:].any()
    assert bias[1, 2, 10] == -4 * 2.0**-4


@pytest.mark.parametrize(
    ("num_alibi_heads", "allowed"),
    [
        (0, "null if num_alibi_heads is 0"),
        (4, "null or (L, 1, H, 1, 1), where L is 1 or the number of blocks, and H is 1 or 4"),
    ],
)
def test_a_wrong_shape_of_the_factors_is_refused(num_alibi_heads: int, allowed: str) -> None:
    with pytest.raises(
        ValueError, match=f"^alibi_scale_shape must be {re.escape(allowed)}, got {re.escape('(1, 12)')}$"
    ):
        ImageEncoderConfig(num_alibi_heads=num_alibi_heads, alibi_scale_shape=(1, 12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bias_for_batch_and_layers(dtype: torch.dtype) -> None:
    alibi, x = build_alibi(14), torch.zeros(2, 197, 24, dtype=dtype)
    bias = alibi(x)
    assert alibi(x[:1]) is bias
    assert (bias.shape, bias.dtype, bias.requires_grad) == ((1, 6, 197, 197), dtype, False)
    # Rows of 200: memory-efficient kernels take them without a copy.
    assert bias.stride()[1:] == (197 * 200, 200, 1)
    assert not alibi.state_dict()


def test_training_can_use_a_bias_from_an_evaluation() -> None:
    block, alibi, x = Block(24, 6, 48, 1e-6), build_alibi(4), torch.randn(2, 9, 24)
    with torch.inference_mode():
        block(x, alibi(x))
    block(x, alibi(x))[1].sum().backward()
    assert block.attn.qkv.weight.grad is not None


def reference_attention(attention: Attention, x: Tensor, bias: Tensor | None) -> Tensor:
    """Compute scaled_dot_product_attention from its formula."""
    query, key, value = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    scores = scores if bias is None else scores + bias
    return attention.proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("columns", "is_short"), [(SHORT_SEQUENCE - 1, True), (SHORT_SEQUENCE, False)])
def test_attention_equals_its_formula_with_the_fastest_kernel(biased: bool, columns: int, is_short: bool) -> None:
    exact = Attention(24, 6).requires_grad_(False)
    attention = copy.deepcopy(exact).bfloat16()
    x = torch.randn(2, columns + 1, 24).bfloat16()
    bias = build_alibi(columns)(x) if biased else None
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        output = attention(x, bias)
    assert any("scaled_dot_product" in event.key for event in profiler.key_averages()) != is_short
    expected = reference_attention(exact, x.float(), None if bias is None else bias.float())
    torch.testing.assert_close(output.float(), expected, atol=0.02, rtol=0)
    torch.testing.assert_close(exact(x.float(), None if bias is None else bias.float()), expected)


@pytest.mark.parametrize("biased", [False, True])
def test_a_fused_kernel_accepts_the_bias(biased: bool) -> None:
    attention, x = Attention(24, 6), torch.randn(2, 197, 24)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # on a CPU the only one that does not store the scores
        attention(x, build_alibi(14)(x) if biased else None).sum().backward()
