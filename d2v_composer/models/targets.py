"""Compute targets, raw embeddings (pooled features), and the mean of a model's normalized layers.

Shapes: B inputs, E extra tokens, N patches or frames, T = E + N time steps (tokens), D channels.
Source: data2vec 2.0 (Baevski et al. 2022, arXiv:2212.07525), section 3; fairseq ``make_targets``.
"""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import layer_norm

from d2v_composer.models.configs import TargetOptions, check_whole
from d2v_composer.models.features import Features, mean_over_time
from d2v_composer.models.names import JOINT, Normalization, check_choice

NORM_EPS = 1e-5


def instance_norm(
    layer_BTD: Tensor, num_extra_tokens: int = 0, padding_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Normalize each channel over the tokens of each input, with biased variance, without an affine transform.

    The first ``num_extra_tokens`` time steps, and padding, are normalized, but do not count in the statistics.

    Returns:
        The normalized layer, (B, T, D), and the factors by which the channels were scaled, (B, 1, D); both float32.
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
    """Return the mean of the normalized layers, (B, T, D) float32, after a LayerNorm if ``final_layer_norm``.

    Args:
        layers: The layers, (B, T, D) each, of any float dtype.
        num_extra_tokens: Number of leading time steps to exclude from InstanceNorm's statistics.
        normalization: Normalization of each layer: ``instance``, over tokens, or ``layer``, over channels.
        final_layer_norm: Apply the LayerNorm after the average.
        padding_mask: (B, T), true for padding, which InstanceNorm's statistics exclude. Results for padding are
            meaningless.
    """
    if normalization == "instance" and torch.is_grad_enabled():
        return instance_norm_mean(num_extra_tokens, final_layer_norm, padding_mask, *layers)
    if normalization == "instance":
        normalized = (instance_norm(layer_BTD, num_extra_tokens, padding_mask)[0] for layer_BTD in layers)
    else:
        normalized = (layer_norm(layer_BTD.float(), layer_BTD.shape[-1:], eps=NORM_EPS) for layer_BTD in layers)
    return average(normalized, final_layer_norm)


def average(layers: Iterable[Tensor], final_layer_norm: bool = False) -> Tensor:
    """Return the mean of layers, (B, T, D), followed by a LayerNorm if ``final_layer_norm``."""
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
    """Apply :class:`InstanceNormMean`; torch.compile must not trace this function."""
    return cast("Tensor", InstanceNormMean.apply(num_extra_tokens, final_layer_norm, padding_mask, *layers))


class InstanceNormMean(torch.autograd.Function):
    """:func:`norm_mean` with InstanceNorm, with a gradient in closed form."""

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
    """Return the gradient of a layer, in the layer's dtype, from the gradient of the normalized layer."""
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


class LayerMean(nn.Module):
    """:func:`norm_mean` with a model's settings.

    Args:
        normalization, final_layer_norm: See :func:`norm_mean`.
    """

    def __init__(self, normalization: Normalization = "instance", final_layer_norm: bool = True) -> None:
        super().__init__()
        check_choice("normalization", normalization, Normalization)
        self.normalization: Normalization = normalization
        self.final_layer_norm = final_layer_norm
        self.norm_mean: Callable[..., Tensor] = norm_mean  # or its compiled version

    def changed(self, normalization: Normalization | None = None, final_layer_norm: bool | None = None) -> "LayerMean":
        """Return a LayerMean with other settings; ``None`` keeps a setting."""
        is_final = self.final_layer_norm if final_layer_norm is None else final_layer_norm
        return LayerMean(normalization or self.normalization, is_final)

    def forward(self, layers: Iterable[Tensor], features: Features, num_dropped: int = 0) -> Tensor:
        """Compute the mean of the normalized layers, (B, T, D) float32.

        Padding and the first ``num_dropped`` tokens do not count in InstanceNorm's statistics.
        """
        return self.norm_mean(layers, num_dropped, self.normalization, self.final_layer_norm, features.padding_mask)


def embeddings_of(features: Features, layer_mean: LayerMean) -> dict[str, Tensor]:
    """Compute every raw embedding of a model: name → (B, channels) float32."""
    if features.pooled is not None:
        output = features.output
        pooled = features.poolings(output, "output_")
    else:
        output, mean = features.with_output(lambda layers: layer_mean(layers, features))
        both = features.poolings(output, "output_") | features.poolings(mean, "layer_mean_")
        pooled = {name: both[name] for name in names_of(layer_mean, features.has_cls_token)}
    return pooled if features.joint is None else pooled | {JOINT: features.joint(output).float()}


def names_of(layer_mean: LayerMean, has_cls_token: bool) -> list[str]:
    """Return the names of a model's raw embeddings that are poolings of ``output`` or ``layer_mean``.

    Without a final LayerNorm, an instance-normalized ``layer_mean`` lacks the poolings ``mean`` and ``mean_patches``.
    """
    names = ["cls", "mean", "mean_patches"][not has_cls_token :]
    is_zero = layer_mean.normalization == "instance" and not layer_mean.final_layer_norm
    of_layers = [name for name in names if name == "cls" or not is_zero]
    return [*(f"output_{name}" for name in names), *(f"layer_mean_{name}" for name in of_layers)]


def target_of(features: Features, options: TargetOptions, top_k: int, layer_mean: LayerMean) -> Tensor:
    """Compute the target from a teacher's features: (B, T, D) float32, without dropped tokens.

    Args:
        features: The teacher's features.
        options: Which layers and tokens enter the target.
        top_k: Number of the teacher's last layers to average.
        layer_mean: The module that normalizes and averages the layers.
    """
    check_whole("average_top_k_layers", top_k, 1, features.num_layers)
    layers = islice(features.layers(options.source), features.num_layers - top_k, None)
    num_dropped = options.num_dropped(features.num_extra_tokens)
    return layer_mean(layers, features, num_dropped)[:, num_dropped:]
