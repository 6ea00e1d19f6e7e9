"""What is regressed, and the loss. Pure functions of tensors.

Shapes: B images, E extra tokens, N patches, T = E + N time steps, D channels.
Source: data2vec 2.0 (Baevski et al. 2022, arXiv:2212.07525), section 3; fairseq ``make_targets``.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, mse_loss

__all__ = ["CLS_LOSS_WEIGHT", "Regression", "instance_norm", "norm_mean", "regression_loss"]

NORM_EPS = 1e-5
CLS_LOSS_WEIGHT = 0.01  # data2vec 2.0's `cls_loss` of the image models


class Regression(NamedTuple):
    """What a step compares, float32."""

    prediction: Tensor
    """(B, T, D), or (B, N, D) where the extra tokens are dropped."""
    target: Tensor
    """Like ``prediction``, without gradient."""
    cls_prediction: Tensor | None = None
    """(B, D), where CLS is regressed to the mean target instead of to its own."""


def instance_norm(layer_BTD: Tensor, num_extra_tokens: int = 0) -> Tensor:
    """Normalise each image's channels over time, float32: biased variance, no affine.

    ``num_extra_tokens`` time steps in front are normalised with the others' statistics without adding to them.
    """
    layer = layer_BTD.float()
    centred = layer - layer[:, num_extra_tokens:].mean(dim=1, keepdim=True)
    # Not torch.var_mean: over a dimension that is not the last it takes more than twice as long on a CPU.
    variance = centred[:, num_extra_tokens:].square().mean(dim=1, keepdim=True)
    return centred * torch.rsqrt(variance + NORM_EPS)


def norm_mean(layers: Iterable[Tensor], num_extra_tokens: int = 0) -> Tensor:
    """InstanceNorm each layer over time, average the layers, LayerNorm over the channels: (B, T, D) float32.

    Args:
        layers: FFN outputs, (B, T, D) each, any float dtype. Read one at a time: given a generator, no more than
            one of them is held, beside the sum.
        num_extra_tokens: Time steps in front that are kept out of InstanceNorm's statistics (0: all count).

    Raises:
        ValueError: There is no layer.
    """
    total: Tensor | None = None
    num_layers = 0
    for layer in layers:
        normalised = instance_norm(layer, num_extra_tokens)
        total = normalised if total is None else total + normalised
        num_layers += 1
    if total is None:
        raise ValueError("norm_mean needs at least one layer")
    return layer_norm(total / num_layers, total.shape[-1:], eps=NORM_EPS)


def regression_loss(regression: Regression) -> Tensor:
    """Mean squared error over all time steps and channels; with ``cls_prediction``, plus its own, weighed by 0.01."""
    loss = mse_loss(regression.prediction.float(), regression.target)
    if regression.cls_prediction is None:
        return loss
    mean_target = regression.target.mean(dim=1)
    return loss + CLS_LOSS_WEIGHT * mse_loss(regression.cls_prediction.float(), mean_target)
