"""Regression targets and the loss, as pure functions of tensors.

Shapes: B images, E extra tokens, N patches, T = E + N time steps (tokens), D channels.
Source: data2vec 2.0 (Baevski et al. 2022, arXiv:2212.07525), section 3; fairseq ``make_targets``.
"""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import layer_norm, mse_loss

NORM_EPS = 1e-5
CLS_LOSS_WEIGHT = 0.01  # data2vec 2.0's `cls_loss` of the image models

Normalization = Literal["instance", "layer"]
"""Normalization of each layer before the average.

``instance`` is over time (fairseq's ``instance_norm_target_layer``, the image models'). ``layer`` is over channels
(``layer_norm_target_layer``): it keeps each channel's mean over time, which a mean pooling sees.
"""


class Regression(NamedTuple):
    """Prediction and target of a step, float32."""

    prediction: Tensor
    """(B, T, D); (B, N, D) without the extra tokens, (B, E, D) with these only."""
    target: Tensor
    """Same shape as ``prediction``, without gradient."""
    cls_prediction: Tensor | None = None
    """(B, D), if CLS is regressed to the mean target instead of its own."""


def instance_norm(layer_BTD: Tensor, num_extra_tokens: int = 0) -> tuple[Tensor, Tensor]:
    """Normalize each image's channels over its tokens, (B, T, D) float32: biased variance, no affine transform.

    The first ``num_extra_tokens`` time steps are normalized, but do not count in the statistics.

    Returns:
        The layer normalized, and the factors of its channels, (B, 1, D).
    """
    layer_BTD = layer_BTD.float()
    centred_BTD = layer_BTD - layer_BTD[:, num_extra_tokens:].mean(dim=1, keepdim=True)
    # Not torch.var_mean, which on a CPU takes more than twice as long over any dimension but the last.
    variance_B1D = centred_BTD[:, num_extra_tokens:].square().mean(dim=1, keepdim=True)
    scale_B1D = torch.rsqrt(variance_B1D + NORM_EPS)
    return centred_BTD * scale_B1D, scale_B1D


def normalize(layer_BTD: Tensor, num_extra_tokens: int = 0, normalization: Normalization = "instance") -> Tensor:
    """Normalize one layer, (B, T, D) float32; LayerNorm ignores ``num_extra_tokens``.

    Raises:
        ValueError: ``normalization`` is unknown.
    """
    if normalization == "instance":
        return instance_norm(layer_BTD, num_extra_tokens)[0]
    if normalization == "layer":
        return layer_norm(layer_BTD.float(), layer_BTD.shape[-1:], eps=NORM_EPS)
    raise ValueError(f"normalization must be {' or '.join(get_args(Normalization))}, got {normalization!r}")


def norm_mean(layers: Iterable[Tensor], num_extra_tokens: int = 0, normalization: Normalization = "instance") -> Tensor:
    """Normalize each layer, average the layers, apply LayerNorm: (B, T, D) float32.

    Args:
        layers: FFN outputs, (B, T, D) each, any float dtype. From a generator, only one at a time is in memory.
        num_extra_tokens: Leading time steps excluded from InstanceNorm's statistics.
        normalization: Normalization of each layer: ``instance``, InstanceNorm over time, or ``layer``, LayerNorm.

    Raises:
        ValueError: There are no layers, or ``normalization`` is unknown.
    """
    if normalization == "instance" and torch.is_grad_enabled():
        return instance_norm_mean(num_extra_tokens, *layers)
    mean_BTD = average(normalize(layer_BTD, num_extra_tokens, normalization) for layer_BTD in layers)
    return layer_norm(mean_BTD, mean_BTD.shape[-1:], eps=NORM_EPS)


def average(layers: Iterable[Tensor]) -> Tensor:
    """Return the mean of layers; from a generator, only one at a time is in memory."""
    sum_BTD: Tensor | None = None
    num_layers = 0
    for layer_BTD in layers:
        sum_BTD = layer_BTD if sum_BTD is None else sum_BTD + layer_BTD
        num_layers += 1
    if sum_BTD is None:
        raise ValueError("norm_mean needs at least one layer")
    return sum_BTD / num_layers


def instance_norm_mean(num_extra_tokens: int, *layers: Tensor) -> Tensor:
    """Call :class:`InstanceNormMean`, which torch.compile must not trace: it would instantiate the class and warn."""
    return cast("Tensor", InstanceNormMean.apply(num_extra_tokens, *layers))


class InstanceNormMean(torch.autograd.Function):
    """norm_mean with InstanceNorm, and its gradient in closed form.

    It keeps the layers and the result. Autograd would keep several float32 tensors a layer, and its backward pass would
    move almost three times the bytes.
    """

    @staticmethod
    def forward(ctx: Any, num_extra_tokens: int, *layers: Tensor) -> Tensor:
        mean_BTD = average(normalize(layer_BTD, num_extra_tokens) for layer_BTD in layers)
        output_BTD, _, scale_BT1 = torch.native_layer_norm(mean_BTD, mean_BTD.shape[-1:], None, None, NORM_EPS)
        ctx.save_for_backward(output_BTD, scale_BT1, *layers)
        ctx.num_extra_tokens = num_extra_tokens
        return output_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BTD,) = grad_outputs
        output_BTD, scale_BT1, *layers = ctx.saved_tensors
        projected_BT1 = (grad_BTD * output_BTD).mean(dim=-1, keepdim=True)
        grad_BTD = grad_BTD - grad_BTD.mean(dim=-1, keepdim=True) - output_BTD * projected_BT1
        grad_BTD = grad_BTD * (scale_BT1 / len(layers))
        return None, *(instance_norm_gradient(grad_BTD, layer_BTD, ctx.num_extra_tokens) for layer_BTD in layers)


def instance_norm_gradient(grad_BTD: Tensor, layer_BTD: Tensor, num_extra_tokens: int) -> Tensor:
    """Return a layer's gradient, in its dtype, from the gradient of the normalized layer."""
    normalized_BTD, scale_B1D = instance_norm(layer_BTD, num_extra_tokens)
    counted = layer_BTD.shape[1] - num_extra_tokens
    projected_B1D = (grad_BTD * normalized_BTD).sum(dim=1, keepdim=True) / counted
    through_statistics_BTD = grad_BTD.sum(dim=1, keepdim=True) / counted + normalized_BTD * projected_B1D
    if num_extra_tokens:  # Inductor cannot write to an empty slice
        through_statistics_BTD[:, :num_extra_tokens] = 0
    return ((grad_BTD - through_statistics_BTD) * scale_B1D).to(layer_BTD.dtype)


def regression_loss(regression: Regression) -> Tensor:
    """Return the mean squared error over all time steps and channels, plus 0.01 × that of ``cls_prediction``."""
    loss = mse_loss(regression.prediction.float(), regression.target)
    if regression.cls_prediction is None:
        return loss
    mean_target_BD = regression.target.mean(dim=1)
    return loss + CLS_LOSS_WEIGHT * mse_loss(regression.cls_prediction.float(), mean_target_BD)
