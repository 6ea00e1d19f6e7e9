"""The normalized mean of layers, as pure functions of tensors.

Shapes: B images, E extra tokens, N patches, T = E + N time steps (tokens), D channels.
Source: data2vec 2.0 (Baevski et al. 2022, arXiv:2212.07525), section 3; fairseq ``make_targets``.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import layer_norm

from d2v_composer.models.names import Normalization

NORM_EPS = 1e-5


def mean_over_time(x_BTD: Tensor, num_extra_tokens: int = 0, padding_mask: Tensor | None = None) -> Tensor:
    """Return the mean over tokens, (B, 1, D), without extra tokens and padding, (B, T) true."""
    x_BTD = x_BTD[:, num_extra_tokens:]
    if padding_mask is None:
        return x_BTD.mean(dim=1, keepdim=True)
    padding_BT1 = padding_mask[:, num_extra_tokens:, None]
    return x_BTD.masked_fill(padding_BT1, 0).sum(dim=1, keepdim=True) / (~padding_BT1).sum(dim=1, keepdim=True)


def instance_norm(
    layer_BTD: Tensor, num_extra_tokens: int = 0, padding_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Normalize each input's channels over its tokens, (B, T, D) float32: biased variance, no affine transform.

    The first ``num_extra_tokens`` time steps, and padding, are normalized, but do not count in the statistics.

    Returns:
        The layer normalized, and the factors of its channels, (B, 1, D).
    """
    layer_BTD = layer_BTD.float()
    centred_BTD = layer_BTD - mean_over_time(layer_BTD, num_extra_tokens, padding_mask)
    # Not torch.var_mean, which on a CPU takes more than twice as long over any dimension but the last.
    variance_B1D = mean_over_time(centred_BTD.square(), num_extra_tokens, padding_mask)
    scale_B1D = torch.rsqrt(variance_B1D + NORM_EPS)
    return centred_BTD * scale_B1D, scale_B1D


def norm_mean(
    layers: Iterable[Tensor],
    num_extra_tokens: int = 0,
    normalization: Normalization = "instance",
    final_layer_norm: bool = True,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Normalize each layer, average the layers, apply LayerNorm: (B, T, D) float32.

    Args:
        layers: FFN outputs, (B, T, D) each, any float dtype. From a generator, only one at a time is in memory.
        num_extra_tokens: Leading time steps excluded from InstanceNorm's statistics.
        normalization: Normalization of each layer: ``instance``, InstanceNorm over time, or ``layer``, LayerNorm.
        final_layer_norm: Apply the last LayerNorm; data2vec 2.0's audio models do not.
        padding_mask: (B, T), true for padding, which is excluded from the statistics too. What it gets means nothing.

    Raises:
        ValueError: There are no layers.
    """
    if normalization == "instance" and torch.is_grad_enabled():
        return instance_norm_mean(num_extra_tokens, final_layer_norm, padding_mask, *layers)
    if normalization == "instance":
        normalized = (instance_norm(layer_BTD, num_extra_tokens, padding_mask)[0] for layer_BTD in layers)
    else:
        normalized = (layer_norm(layer_BTD.float(), layer_BTD.shape[-1:], eps=NORM_EPS) for layer_BTD in layers)
    return average(normalized, final_layer_norm)


def average(layers: Iterable[Tensor], final_layer_norm: bool = False) -> Tensor:
    """Return the mean of layers, with a LayerNorm if asked; from a generator, one at a time is in memory."""
    sum_BTD: Tensor | None = None
    num_layers = 0
    for layer_BTD in layers:
        sum_BTD = layer_BTD if sum_BTD is None else sum_BTD + layer_BTD
        num_layers += 1
    if sum_BTD is None:
        raise ValueError("norm_mean needs at least one layer")
    mean_BTD = sum_BTD / num_layers
    return layer_norm(mean_BTD, mean_BTD.shape[-1:], eps=NORM_EPS) if final_layer_norm else mean_BTD


def instance_norm_mean(
    num_extra_tokens: int, final_layer_norm: bool, padding_mask: Tensor | None, *layers: Tensor
) -> Tensor:
    """Call :class:`InstanceNormMean`, which torch.compile must not trace: it would instantiate the class and warn."""
    return cast("Tensor", InstanceNormMean.apply(num_extra_tokens, final_layer_norm, padding_mask, *layers))


class InstanceNormMean(torch.autograd.Function):
    """norm_mean with InstanceNorm, and its gradient in closed form.

    It keeps the layers and the result. Autograd would keep several float32 tensors a layer, and its backward pass would
    move almost three times the bytes.
    """

    @staticmethod
    def forward(
        ctx: Any, num_extra_tokens: int, final_layer_norm: bool, padding_mask: Tensor | None, *layers: Tensor
    ) -> Tensor:
        mean_BTD = average(instance_norm(layer_BTD, num_extra_tokens, padding_mask)[0] for layer_BTD in layers)
        ctx.num_extra_tokens = num_extra_tokens
        if not final_layer_norm:
            ctx.save_for_backward(None, None, padding_mask, *layers)
            return mean_BTD
        output_BTD, _, scale_BT1 = torch.native_layer_norm(mean_BTD, mean_BTD.shape[-1:], None, None, NORM_EPS)
        ctx.save_for_backward(output_BTD, scale_BT1, padding_mask, *layers)
        return output_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BTD,) = grad_outputs
        output_BTD, scale_BT1, padding_mask, *layers = ctx.saved_tensors
        if output_BTD is None:
            grad_BTD = grad_BTD / len(layers)
        else:
            projected_BT1 = (grad_BTD * output_BTD).mean(dim=-1, keepdim=True)
            grad_BTD = grad_BTD - grad_BTD.mean(dim=-1, keepdim=True) - output_BTD * projected_BT1
            grad_BTD = grad_BTD * (scale_BT1 / len(layers))
        options = ctx.num_extra_tokens, padding_mask
        return None, None, None, *(instance_norm_gradient(grad_BTD, layer_BTD, *options) for layer_BTD in layers)


def instance_norm_gradient(
    grad_BTD: Tensor, layer_BTD: Tensor, num_extra_tokens: int, padding_mask: Tensor | None = None
) -> Tensor:
    """Return a layer's gradient, in its dtype, from the gradient of the normalized layer."""
    normalized_BTD, scale_B1D = instance_norm(layer_BTD, num_extra_tokens, padding_mask)
    counted: Any = layer_BTD.shape[1] - num_extra_tokens
    if padding_mask is not None:
        counted = (~padding_mask[:, num_extra_tokens:, None]).sum(dim=1, keepdim=True)
    projected_B1D = (grad_BTD * normalized_BTD).sum(dim=1, keepdim=True) / counted
    through_statistics_BTD = grad_BTD.sum(dim=1, keepdim=True) / counted + normalized_BTD * projected_B1D
    if num_extra_tokens:  # Inductor cannot write to an empty slice
        through_statistics_BTD[:, :num_extra_tokens] = 0
    if padding_mask is not None:
        through_statistics_BTD = through_statistics_BTD.masked_fill(padding_mask[..., None], 0)
    return ((grad_BTD - through_statistics_BTD) * scale_B1D).to(layer_BTD.dtype)
