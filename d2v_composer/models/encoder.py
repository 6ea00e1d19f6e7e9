"""The frozen encoder that teacher and student share; it turns images into tokens.

Shapes: B images, S pixels per side (or height and width), E extra tokens, N patches, T = E + N tokens, D channels.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear
from typing_extensions import Self

from d2v_composer.models.attention import Alibi, autocast_dtype
from d2v_composer.models.sizes import EncoderConfig, height_and_width


class Frozen(nn.Module):
    """A module that stays in eval mode and gets no gradient. Call :meth:`freeze` once the parameters exist.

    ``Trainer.fit`` and ``model_eval_mode`` call ``model.train(mode=True)`` on the whole model; here it has no effect.
    """

    def freeze(self) -> Self:
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def cast_weights(self, dtype: torch.dtype) -> Self:
        """Cast the weights of linear and convolution layers to autocast's dtype once, instead of in every step.

        LayerNorms, positions and extra tokens keep float32, in which autocast computes with them.
        """
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.to(dtype)
        return self


class PatchProjection(nn.Conv2d):
    """A convolution with a stride equal to its kernel, computed as one matrix product over patches.

    On a GPU, one kernel normalizes the patches and writes them in half precision.
    """

    def forward(self, input: Tensor) -> Tensor:
        height, width = self.kernel_size
        patches = input.unflatten(3, (-1, width)).unflatten(2, (-1, height)).permute(0, 2, 4, 1, 3, 5)
        return linear(patches.flatten(3), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class Encoder(Frozen):
    """Patches, positions, extra tokens, then blocks.

    Attributes:
        alibi: The bias of its blocks, if they have one.
        alibi_scale: Learned factors of that bias.
        stem_macs: Multiply-accumulates for one image before the blocks.
        half_residual: Keep the residual stream of these and of a teacher's blocks in autocast's dtype, not in float32.
    """

    image_mean: Tensor
    image_std: Tensor
    alibi: Alibi | None
    alibi_scale: Tensor | None
    stem_macs: int

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.alibi = self.alibi_scale = None
        self.half_residual = False
        self.register_buffer("image_mean", torch.tensor(config.image_mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(config.image_std).view(1, -1, 1, 1), persistent=False)

    @property
    @abstractmethod
    def block_list(self) -> list[Any]:
        """The blocks, typed as the subclass's kind of block."""

    @abstractmethod
    def embed_patches(self, images: Tensor) -> Tensor:
        """Return the first block's input, (B, T, D), from images as in :meth:`forward`."""

    @abstractmethod
    def block_contexts(self, x_BTD: Tensor) -> list[Tensor | None]:
        """Return each block's context, optionally followed by the contexts of a teacher's blocks."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: (B, 3, S, S) float, already normalized; or uint8 of any size, resized (antialias) and normalized
                here.

        Returns:
            (B, T, D), without gradient.

        Raises:
            ValueError: The images have another shape or dtype.
        """
        return self.encode_with_gradient(images)

    def encode_with_gradient(self, images: Tensor) -> Tensor:
        """Encode images as :meth:`forward` does, with gradients for the parts that train."""
        x_BTD = self.embed_patches(images)
        if self.half_residual:
            x_BTD = x_BTD.to(autocast_dtype(x_BTD))
        for block, context in zip(self.block_list, self.block_contexts(x_BTD), strict=False):
            x_BTD, _ = block(x_BTD, context)
        return x_BTD

    def prepare(self, images: Tensor) -> Tensor:
        """Resize and normalize uint8 images; return float images unchanged.

        Raises:
            ValueError: The images have another shape or dtype.
        """
        channels, size = self.config.in_chans, height_and_width(self.config.image_size)
        is_uint8, is_batch = images.dtype == torch.uint8, images.ndim == 4 and images.shape[1] == channels
        if not is_batch or not (is_uint8 or (images.is_floating_point() and images.shape[2:] == size)):
            raise ValueError(
                f"images must be (B, {channels}, H, W) uint8, or (B, {channels}, {size[0]}, {size[1]}) float and "
                f"normalized; got {tuple(images.shape)} {str(images.dtype).removeprefix('torch.')}"
            )
        if not is_uint8:
            return images
        if images.shape[2:] != size:
            images = resize(images, size, self.config.interpolation)
        return images.float().sub_(255 * self.image_mean).div_(255 * self.image_std)

    def forward_macs(self) -> int:
        """Return the multiply-accumulates for one image."""
        return self.stem_macs + sum(block.forward_macs(self.config.num_tokens) for block in self.block_list)


def build_alibi(config: EncoderConfig, num_heads: int, num_alibi_heads: int) -> Alibi | None:
    """Build ALiBi for blocks on this encoder's grid; ``None`` for 0 ALiBi heads."""
    if not num_alibi_heads:
        return None
    extra = config.num_extra_tokens
    return Alibi(config.grid_size, num_heads=num_heads, num_alibi_heads=num_alibi_heads, num_extra_tokens=extra)


def resize(images: Tensor, shape: tuple[int, int], mode: str) -> Tensor:
    """Resize uint8 images to (B, 3, *shape) with antialiasing; whole numbers from 0 to 255."""
    if images.device.type == "cpu":
        # The kernel is fastest on channels last, all that follows on contiguous images.
        return interpolate(images, shape, mode=mode, antialias=True).contiguous()
    return resize_in_float(images, shape, mode)


def resize_in_float(images: Tensor, shape: tuple[int, int], mode: str) -> Tensor:
    """Resize like the uint8 kernel, which only CPUs have: rows, then columns, clamping the overshoot each time."""
    pixels = images.float()
    for each_shape in ((images.shape[-2], shape[1]), shape):
        pixels = interpolate(pixels, each_shape, mode=mode, antialias=True).round().clamp(0, 255)
    return pixels
