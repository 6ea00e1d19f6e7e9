"""The distillation written without optimisations: the baseline of our training step.

Two whole models, each with its own copy of the encoder; explicit attention, its bias repeated over the batch; targets
in the steps of fairseq's ``make_targets``. The weights and the loss are ours.
Shapes: B images, T time steps, D channels, H heads.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import instance_norm, layer_norm, mse_loss

from d2v_composer.models.alibi import autocast_dtype
from d2v_composer.models.block import Attention, Block, FfnBlock
from d2v_composer.models.distillation import DistillationModel
from d2v_composer.models.encoder import Encoder
from d2v_composer.models.targets import NORM_EPS

__all__ = ["NaiveDistillation"]


class NaiveDistillation(nn.Module):
    """Compute the loss of a batch of images.

    Args:
        model: The model to copy, with ``layer_mean`` prediction and all time steps regressed.
        shares_encoder: Encode images only once, for teacher and student.
    """

    def __init__(self, model: DistillationModel, shares_encoder: bool = False) -> None:
        super().__init__()
        self.average_top_k_layers = model.teacher.config.average_top_k_layers
        self.shares_encoder = shares_encoder
        self.teacher = NaiveTransformer(model.teacher.encoder, model.teacher.block_list)
        self.student = NaiveTransformer(model.student.encoder, model.student.block_list)
        self.alibi = model.student.alibi

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.teacher.encode(images)
            target = norm_mean(self.teacher.ffn_outputs(x)[-self.average_top_k_layers :])
        if not self.shares_encoder:
            x = self.student.encode(images)
        bias = None
        if self.alibi is not None:
            bias = self.alibi(x.shape[1], autocast_dtype(x), x.device).repeat(len(x), 1, 1, 1)
        return mse_loss(norm_mean(self.student.ffn_outputs(x, bias)), target)


class NaiveTransformer(nn.Module):
    def __init__(self, encoder: Encoder, blocks: Sequence[FfnBlock]) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        self.blocks = nn.ModuleList(copy.deepcopy(block) for block in blocks)

    def encode(self, images: Tensor) -> Tensor:
        x = self.encoder.embed_patches(images)
        for block in self.encoder.block_list:
            assert isinstance(block, Block)
            x, _ = run_block(block, x)
        return x

    def ffn_outputs(self, x: Tensor, bias: Tensor | None = None) -> list[Tensor]:
        outputs = []
        for block in self.blocks:
            assert isinstance(block, Block)
            x, ffn_output = run_block(block, x, bias)
            outputs.append(ffn_output)
        return outputs


def run_block(block: Block, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    attended = block.norm1(x + attention(block.attn, x, bias))
    ffn_output = block.mlp(attended)
    return block.norm2(attended + ffn_output), ffn_output


def attention(layer: Attention, x_BTD: Tensor, bias_BHTT: Tensor | None) -> Tensor:
    num_inputs, num_steps, dim = x_BTD.shape
    qkv = layer.qkv(x_BTD).reshape(num_inputs, num_steps, 3, layer.num_heads, dim // layer.num_heads)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if bias_BHTT is not None:
        scores = scores + bias_BHTT
    attended = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value
    return layer.proj(attended.transpose(1, 2).reshape(num_inputs, num_steps, dim))


def norm_mean(layers: list[Tensor]) -> Tensor:
    normalised = [instance_norm(layer.transpose(1, 2).float(), eps=NORM_EPS).transpose(1, 2) for layer in layers]
    total = sum(normalised[1:], normalised[0]) / len(normalised)
    return layer_norm(total, total.shape[-1:], eps=NORM_EPS)
