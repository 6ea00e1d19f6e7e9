"""Attention: the ALiBi bias, its shapes and kernels, padding."""

import copy
import itertools
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from d2v_composer.checkpoints.load import load_teacher
from d2v_composer.models.attention import (
    MAX_KEPT,
    SHORT_SEQUENCE,
    Alibi,
    Attention,
    Block,
    absolute_distance,
    alibi_slopes,
    manhattan_distance,
    mask_padding,
)
from d2v_composer.models.data2vec2 import ImageEncoderConfig
from d2v_composer.models.encoder import build_alibi
from helpers import GOLDEN

CPU = torch.device("cpu")


def text_alibi(num_heads: int = 6, num_alibi_heads: int = 6, num_extra_tokens: int = 1) -> Alibi:
    return Alibi(
        absolute_distance,
        num_heads=num_heads,
        num_alibi_heads=num_alibi_heads,
        num_extra_tokens=num_extra_tokens,
    )


def test_slopes_are_geometric_series() -> None:
    torch.testing.assert_close(alibi_slopes(4), torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]))
    # 6 heads: those of 4, then the first and third of 8.
    torch.testing.assert_close(alibi_slopes(6)[4:], torch.tensor([2.0**-1, 2.0**-3]))


def test_bias_of_images() -> None:
    distance = manhattan_distance(9, num_columns=3)
    assert distance[0, 8] == 4  # corner to corner of a 3 × 3 grid
    assert manhattan_distance(6, num_columns=3)[0].tolist() == [0, 1, 2, 1, 2, 3]
    with pytest.raises(ValueError, match="full rows of 4 patches, got 6"):
        manhattan_distance(6, num_columns=4)
    alibi = Alibi(partial(manhattan_distance, num_columns=3), num_heads=6, num_alibi_heads=4, num_extra_tokens=2)
    bias = alibi(11, torch.float32, CPU)[0]
    assert bias.shape == (6, 11, 11)
    assert not bias[:, :2].any()
    assert not bias[:, :, :2].any()
    assert not bias[4:].any()
    assert bias[1, 2, 10] == -4 * 2.0**-4
    with pytest.raises(ValueError, match="full rows of 3 patches"):
        alibi(10, torch.float32, CPU)


def test_bias_of_sequences() -> None:
    bias = text_alibi()(8, torch.float32, CPU)[0]
    slopes = alibi_slopes(6)
    for head, row, column in itertools.product(range(6), range(1, 8), range(1, 8)):
        assert bias[head, row, column] == -slopes[head] * abs(row - column)
    assert not bias[:, 0].any()
    assert not bias[:, :, 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_steps", [1, 7, 197, 200])
def test_one_bias_for_batch_and_layers(dtype: torch.dtype, num_steps: int) -> None:
    alibi = text_alibi()
    bias = alibi(num_steps, dtype, CPU)
    assert alibi(num_steps, dtype, CPU) is bias
    assert bias.shape == (1, 6, num_steps, num_steps)
    assert bias.dtype == dtype
    assert not bias.requires_grad
    assert bias.stride(-1) == 1
    # 197 → rows of 200: as the memory-efficient kernels take them without a copy.
    assert all(stride % 8 == 0 for stride in bias.stride()[1:-1])
    assert bias.untyped_storage().nbytes() == 6 * num_steps * -(-num_steps // 8) * 8 * dtype.itemsize
    assert not alibi.state_dict()


def test_only_a_few_lengths_are_cached() -> None:
    alibi = text_alibi()
    biases = [alibi(num_steps, torch.float32, CPU) for num_steps in range(2, 40)]
    assert [bias.shape[-1] for bias in biases] == list(range(2, 40))
    assert len(alibi.kept) == MAX_KEPT
    assert alibi(39, torch.float32, CPU) is biases[-1]


def test_training_can_use_a_bias_from_an_evaluation() -> None:
    block = Block(24, 6, 48, 1e-6)
    alibi = text_alibi()
    x = torch.randn(2, 8, 24)
    with torch.inference_mode():
        block(x, alibi(8, x.dtype, CPU))
    _, ffn_output = block(x, alibi(8, x.dtype, CPU))
    ffn_output.sum().backward()
    assert block.attn.qkv.weight.grad is not None


def reference_attention(attention: Attention, x: Tensor, bias: Tensor | None) -> Tensor:
    """Compute scaled_dot_product_attention from its formula."""
    query, key, value = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    scores = scores if bias is None else scores + bias
    return attention.proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("num_steps", [5, 8, 13])
def test_attention_equals_its_formula(biased: bool, num_steps: int) -> None:
    attention = Attention(24, 6)
    x = torch.randn(3, num_steps, 24)
    bias = text_alibi()(num_steps, x.dtype, CPU) if biased else None
    torch.testing.assert_close(attention(x, bias), reference_attention(attention, x, bias))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("num_steps", [SHORT_SEQUENCE, SHORT_SEQUENCE + 1])
def test_short_sequences_in_bfloat16_need_no_fused_kernel(biased: bool, num_steps: int) -> None:
    attention = Attention(24, 6).bfloat16().requires_grad_(False)
    x = torch.randn(2, num_steps, 24, dtype=torch.bfloat16)
    bias = text_alibi()(num_steps, x.dtype, CPU) if biased else None
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        found = attention(x, bias)
    is_fused = any("scaled_dot_product" in event.key for event in profiler.key_averages())
    assert is_fused == (num_steps > SHORT_SEQUENCE)
    exact = copy.deepcopy(attention).float()
    expected = reference_attention(exact, x.float(), None if bias is None else bias.float())
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("biased", [False, True])
def test_a_fused_kernel_accepts_the_bias(biased: bool) -> None:
    attention = Attention(24, 6)
    bias = text_alibi()(197, torch.float32, CPU) if biased else None
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # on a CPU the only one that does not store the scores
        attention(torch.randn(2, 197, 24), bias).sum().backward()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_not_attended_to(biased: bool, dtype: torch.dtype) -> None:
    block = Block(24, 6, 48, 1e-6).to(dtype)
    lengths = [5, 13, 8]
    x = torch.randn(3, 13, 24, dtype=dtype)
    padding_mask = torch.arange(13) >= torch.tensor(lengths)[:, None]
    bias = text_alibi()(13, dtype, CPU) if biased else None
    masked = mask_padding(bias, padding_mask, dtype)
    assert masked.shape == ((3, 6, 13, 13) if biased else (3, 1, 1, 13))
    assert masked.dtype == dtype
    output, ffn_output = block(x, masked)
    for i, length in enumerate(lengths):
        alone_bias = text_alibi()(length, dtype, CPU) if biased else None
        alone_output, alone_ffn_output = block(x[i : i + 1, :length], alone_bias)
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(output[i : i + 1, :length], alone_output, atol=tolerance, rtol=0)
        torch.testing.assert_close(ffn_output[i : i + 1, :length], alone_ffn_output, atol=tolerance, rtol=0)


@pytest.mark.parametrize("alibi", [False, True])
def test_padding_does_not_change_a_students_output(alibi: bool) -> None:
    teacher = load_teacher(GOLDEN / "tiny_base.pt")
    student = teacher.build_student(depth=2, alibi=alibi)
    size = teacher.config.image_size
    x = teacher.encode(torch.randn(2, 3, size, size))
    padding_mask = torch.zeros(x.shape[:2], dtype=torch.bool)
    padding_mask[1, -3:] = True
    output, ffn_outputs = student.forward_blocks(x, padding_mask)
    changed = x.clone()
    changed[1, -3:] += 1
    changed_output, _ = student.forward_blocks(changed, padding_mask)
    torch.testing.assert_close(changed_output[~padding_mask], output[~padding_mask])
    assert not torch.allclose(changed_output[padding_mask], output[padding_mask])
    assert len(ffn_outputs) == 2
    unpadded, _ = student.forward_blocks(x)
    torch.testing.assert_close(output[0], unpadded[0])
    assert not torch.allclose(output[1, :-3], unpadded[1, :-3])


def test_learned_scales_are_clamped_at_0() -> None:
    alibi = text_alibi(num_heads=4, num_alibi_heads=3)
    plain = alibi(9, torch.float32, CPU)
    scale = nn.Parameter(torch.tensor([2.0, -1.0, 0.5]).view(1, 3, 1, 1))
    scaled = alibi(9, torch.float32, CPU, scale)
    torch.testing.assert_close(scaled[0, 0], 2 * plain[0, 0])
    assert not scaled[0, 1].any()  # negative counts as 0
    torch.testing.assert_close(scaled[0, 2], 0.5 * plain[0, 2])
    assert not scaled[0, 3].any()
    assert scaled.stride(-2) == 16


def test_images_have_no_alibi_of_no_heads() -> None:
    assert build_alibi(ImageEncoderConfig(), num_heads=12, num_alibi_heads=0) is None
