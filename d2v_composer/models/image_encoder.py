"""The frozen modality encoder for images: pixels to time steps.

Teacher and student share it. Attribute names are fairseq's below ``modality_encoders.IMAGE``, so that weights load
from a plain dict.
Shapes: B images, S pixels a side, N patches, E extra tokens, T = E + N time steps, D channels, L layers.
Source: data2vec 2.0 (Baevski et al. 2022, arXiv:2212.07525), fairseq ``modalities/images.py``.
"""

import math
from collections.abc import Container
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from d2v_composer.models.alibi import Alibi, autocast_dtype, manhattan_distance
from d2v_composer.models.block import Block
from d2v_composer.models.frozen import Frozen
from d2v_composer.models.sizes import MAX_DEPTH, MAX_PATCHES, MAX_WIDTH, check_mlp_ratio, check_whole, is_number

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "ImageEncoder", "ImageEncoderConfig"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MAX_NORM_EPS = 1e-2
# Allowed means and standard deviations of pixels from 0 to 1.
MEAN_RANGE, STD_RANGE = (0.0, 1.0), (1e-3, 1.0)


@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig:
    """Sizes of a data2vec 2.0 image encoder; the defaults are data2vec's own.

    Raises:
        ValueError: A size is out of range, or does not fit the others.
    """

    embed_dim: int = 768
    num_heads: int = 12
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    prenet_depth: int = 4
    num_extra_tokens: int = 0
    image_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    num_alibi_heads: int = 0
    """0: no ALiBi (``use_alibi_encoder: false``)."""
    alibi_scale_shape: tuple[int, ...] | None = None
    """(L or 1, 1, H or 1, 1, 1), if the checkpoint has a scale for ALiBi."""
    image_mean: tuple[float, ...] = IMAGENET_MEAN
    image_std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("embed_dim", "num_heads", "image_size", "patch_size", "in_chans"):
            check_whole(name, getattr(self, name), 1, MAX_WIDTH)
        for name in ("num_extra_tokens", "num_alibi_heads"):
            check_whole(name, getattr(self, name), 0, MAX_WIDTH)
        check_whole("prenet_depth", self.prenet_depth, 0, MAX_DEPTH)
        check_mlp_ratio(self.mlp_ratio, self.embed_dim)
        if not is_number(self.norm_eps, math.ulp(0), MAX_NORM_EPS):
            raise ValueError(f"norm_eps must be above 0 and at most {MAX_NORM_EPS}, got {self.norm_eps!r}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads must divide embed_dim, got {self.num_heads} heads for {self.embed_dim}")
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size must divide image_size, got {self.patch_size} for {self.image_size}")
        if self.num_patches > MAX_PATCHES:
            raise ValueError(f"images must have at most {MAX_PATCHES} patches, got {self.num_patches}")
        if self.num_alibi_heads > self.num_heads:
            raise ValueError(f"num_alibi_heads must be at most num_heads {self.num_heads}, got {self.num_alibi_heads}")
        self._check_channels("image_mean", *MEAN_RANGE)
        self._check_channels("image_std", *STD_RANGE)
        self.check_alibi_scale(range(self.prenet_depth, 2 * MAX_DEPTH + 1))

    def _check_channels(self, name: str, minimum: float, maximum: float) -> None:
        values = getattr(self, name)
        if not isinstance(values, tuple) or len(values) != self.in_chans:
            raise ValueError(f"{name} must be a number for each of in_chans {self.in_chans}, got {values!r}")
        if not all(is_number(value, minimum, maximum) for value in values):
            raise ValueError(f"{name} must be numbers from {minimum:g} to {maximum:g}, got {values!r}")

    def check_alibi_scale(self, num_layers: Container[int]) -> None:
        """Check the shape of ALiBi's scale.

        Args:
            num_layers: The allowed numbers of layers of the whole model.

        Raises:
            ValueError: Another shape is needed.
        """
        shape, heads = self.alibi_scale_shape, self.num_alibi_heads
        if shape is None:
            return
        if not heads:
            raise ValueError(f"alibi_scale_shape must be null without ALiBi heads, got {shape!r}")
        if not isinstance(shape, tuple) or len(shape) != 5 or not all(type(size) is int for size in shape):
            raise ValueError(f"alibi_scale_shape must be 5 whole numbers, got {shape!r}")
        layers, *others = shape
        if (layers != 1 and layers not in num_layers) or others not in [[1, 1, 1, 1], [1, heads, 1, 1]]:
            raise ValueError(f"alibi_scale_shape must be (layers or 1, 1, {heads} or 1, 1, 1), got {shape!r}")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_steps(self) -> int:
        return self.num_extra_tokens + self.num_patches

    def build_alibi(self, num_heads: int, num_alibi_heads: int) -> Alibi | None:
        """Build 2-D ALiBi for blocks on this encoder; ``None`` for 0 ALiBi heads."""
        if not num_alibi_heads:
            return None
        return Alibi(
            manhattan_distance,
            num_heads=num_heads,
            num_alibi_heads=num_alibi_heads,
            num_extra_tokens=self.num_extra_tokens,
        )


class ImageEncoder(Frozen):
    """Patch embedding, fixed positions, extra tokens, LayerNorm, ``prenet_depth`` blocks."""

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.embed_dim, config.patch_size
        self.local_encoder = nn.ModuleDict({"proj": nn.Conv2d(config.in_chans, dim, patch, stride=patch)})
        self.fixed_positional_encoder = nn.ParameterDict({"positions": torch.zeros(1, config.num_patches, dim)})
        self.extra_tokens = (
            nn.Parameter(torch.zeros(1, config.num_extra_tokens, dim)) if config.num_extra_tokens else None
        )
        hidden_dim = int(dim * config.mlp_ratio)
        blocks = [Block(dim, config.num_heads, hidden_dim, config.norm_eps) for _ in range(config.prenet_depth)]
        self.context_encoder = nn.ModuleDict(
            {"norm": nn.LayerNorm(dim, eps=config.norm_eps), "blocks": nn.ModuleList(blocks)}
        )
        self.alibi = config.build_alibi(config.num_heads, config.num_alibi_heads)
        self.alibi_scale = nn.Parameter(torch.ones(config.alibi_scale_shape)) if config.alibi_scale_shape else None
        self.register_buffer("image_mean", torch.tensor(config.image_mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(config.image_std).view(1, -1, 1, 1), persistent=False)

    @property
    def block_list(self) -> list[Block]:
        """The blocks, typed."""
        return cast("list[Block]", list(cast("nn.ModuleList", self.context_encoder["blocks"])))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: (B, 3, S, S) float, already normalised; or uint8 of any size, resized (bicubic, antialias) and
                normalised here.

        Returns:
            (B, T, D), without gradient.

        Raises:
            ValueError: The images have another shape or dtype.
        """
        x_BTD = self.embed_patches(images)
        for block, bias in zip(self.block_list, self.layer_biases(x_BTD), strict=False):
            x_BTD, _ = block(x_BTD, bias)
        return x_BTD

    def prepare(self, images: Tensor) -> Tensor:
        """Resize and normalise uint8 images; return float images unchanged.

        Raises:
            ValueError: The images have another shape or dtype.
        """
        self.check_images(images)
        if images.dtype != torch.uint8:
            return images
        size = self.config.image_size
        pixels = (images if images.shape[-2:] == (size, size) else resize(images, size)).float()
        return pixels.sub_(255 * self.image_mean).div_(255 * self.image_std)

    def check_images(self, images: Tensor) -> None:
        """Refuse images that :meth:`forward` cannot encode.

        Raises:
            ValueError: Names the shape that is expected, and the one found.
        """
        channels, size, shape = self.config.in_chans, self.config.image_size, tuple(images.shape)
        is_uint8 = images.dtype == torch.uint8
        is_batch = len(shape) == 4 and shape[1] == channels
        if is_batch and (is_uint8 or (images.is_floating_point() and shape[2:] == (size, size))):
            return
        hint = ""
        if len(shape) == 3 and shape[0] == channels:
            hint = "; for one image: images[None]"
        elif len(shape) == 4 and shape[3] == channels and not is_batch:
            hint = "; for channels last: images.permute(0, 3, 1, 2)"
        raise ValueError(
            f"images must be (B, {channels}, H, W) uint8, or (B, {channels}, {size}, {size}) float and normalised; got "
            f"{shape} {str(images.dtype).removeprefix('torch.')}{hint}"
        )

    def embed_patches(self, images: Tensor) -> Tensor:
        """Return the first block's input, (B, T, D): patches, positions, extra tokens, LayerNorm."""
        images = self.prepare(images)
        x_BND = self.local_encoder["proj"](images).flatten(2).transpose(1, 2)
        x_BTD = x_BND + self.fixed_positional_encoder["positions"]
        if self.extra_tokens is not None:
            x_BTD = torch.cat([self.extra_tokens.expand(x_BTD.shape[0], -1, -1), x_BTD], dim=1)
        return self.context_encoder["norm"](x_BTD)

    def layer_biases(self, x_BTD: Tensor, num_layers: int | None = None) -> list[Tensor | None]:
        """Return the attention biases of this encoder's blocks and of the teacher's blocks after them.

        Args:
            x_BTD: The blocks' input.
            num_layers: Number of blocks; default ``prenet_depth``.
        """
        num_layers = self.config.prenet_depth if num_layers is None else num_layers
        if self.alibi is None:
            return [None] * num_layers
        shape = (x_BTD.shape[1], autocast_dtype(x_BTD), x_BTD.device)
        if self.alibi_scale is None or len(self.alibi_scale) == 1:
            scale = None if self.alibi_scale is None else self.alibi_scale[0]
            return [self.alibi(*shape, scale)] * num_layers
        return [self.alibi(*shape, layer_scale) for layer_scale in self.alibi_scale]

    def forward_macs(self) -> int:
        """Return the multiply-accumulates for one image."""
        config = self.config
        patch_embedding = config.num_patches * config.embed_dim * config.in_chans * config.patch_size**2
        return patch_embedding + sum(block.forward_macs(config.num_steps) for block in self.block_list)


def resize(images: Tensor, size: int) -> Tensor:
    """Resize uint8 images to (B, 3, size, size), bicubic with antialiasing; whole numbers from 0 to 255."""
    if images.device.type == "cpu":
        # The kernel is fastest on channels last, all that follows on contiguous images.
        return interpolate(images, size, mode="bicubic", antialias=True).contiguous()
    return resize_in_float(images, size)


def resize_in_float(images: Tensor, size: int) -> Tensor:
    """Resize like :func:`resize` without its uint8 kernel: rows, then columns, each time clamping the overshoot."""
    pixels = images.float()
    for shape in ((images.shape[-2], size), (size, size)):
        pixels = interpolate(pixels, shape, mode="bicubic", antialias=True).round().clamp(0, 255)
    return pixels
