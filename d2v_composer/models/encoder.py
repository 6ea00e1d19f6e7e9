"""A frozen encoder that teacher and student share: images to tokens; and checks of sizes from files.

Shapes: B images, S pixels per side (or height and width), E extra tokens, N patches, T = E + N tokens, D channels.
"""

import re
from abc import abstractmethod
from reprlib import repr as short  # a list in a file may hold another one a million times
from typing import Any, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from typing_extensions import Self

from d2v_composer.models.attention import Alibi, FfnBlock

ImageSize = int | tuple[int, int]
"""Pixels per side of a square, or (height, width)."""

# Far above any vision transformer's. Larger sizes mean a corrupt file, or one that would exhaust the memory.
MAX_WIDTH = 1 << 16
MAX_DEPTH = 1000
MAX_PATCHES = 1 << 14


def check_whole(name: str, value: Any, minimum: int, maximum: int) -> None:
    """Raise ValueError, with the name of the size, unless it is a whole number within the range."""
    if type(value) is not int or not minimum <= value <= maximum:
        raise ValueError(f"{name} must be a whole number from {minimum} to {maximum}, got {short(value)}")


def check_number(name: str, value: Any, minimum: float, maximum: float) -> None:
    """Raise ValueError, with the name of the size, unless it is a number within the range."""
    if type(value) not in (int, float) or not minimum <= value <= maximum:
        raise ValueError(f"{name} must be a number from {minimum:g} to {maximum:g}, got {short(value)}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise ValueError, with the name of the option, unless it is one of a Literal's values."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {short(value)}")


def check_pixel_statistics(in_chans: int, image_mean: Any, image_std: Any) -> None:
    """Raise ValueError unless there are a mean and a standard deviation for each channel, of pixels from 0 to 1."""
    for name, values, minimum in (("image_mean", image_mean, 0.0), ("image_std", image_std, 1e-3)):
        if not isinstance(values, tuple) or len(values) != in_chans:
            raise ValueError(f"{name} must be a number for each of in_chans {in_chans}, got {short(values)}")
        for value in values:
            check_number(name, value, minimum, 1.0)


def height_and_width(image_size: ImageSize) -> tuple[int, int]:
    """Return (height, width) in pixels."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def parse_image_size(image_size: Any) -> ImageSize:
    """Return an image size from any source: pixels per side, or (height, width) if they differ.

    Raises:
        ValueError: It is neither a number of pixels, nor two, nor text such as '112x168'.
    """
    shape = image_size if isinstance(image_size, tuple) else (image_size,)
    if isinstance(image_size, str) and re.fullmatch(r"\d{1,9}(x\d{1,9})?", image_size):
        shape = tuple(map(int, image_size.split("x")))
    if len(shape) not in (1, 2):
        raise ValueError(f"image_size must be a whole number, or height and width, got {short(image_size)}")
    for size in shape:
        check_whole("image_size", size, 1, MAX_WIDTH)
    return shape[0] if shape[0] == shape[-1] else (shape[0], shape[-1])


class Frozen(nn.Module):
    """A module that stays in eval mode and takes no gradient. Call :meth:`freeze` once the parameters exist.

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


class EncoderConfig(Protocol):
    """Sizes of an encoder."""

    @property
    def embed_dim(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def norm_eps(self) -> float: ...  # of a student's LayerNorms, too
    @property
    def num_extra_tokens(self) -> int: ...  # before the patches: CLS and registers
    @property
    def has_cls_token(self) -> bool: ...  # the first extra token is CLS; some models have registers only
    @property
    def image_size(self) -> ImageSize: ...
    @property
    def in_chans(self) -> int: ...
    @property
    def image_mean(self) -> tuple[float, ...]: ...
    @property
    def image_std(self) -> tuple[float, ...]: ...
    @property
    def interpolation(self) -> str: ...  # bicubic or bilinear
    @property
    def grid_size(self) -> tuple[int, int]: ...  # rows and columns of patches
    @property
    def num_tokens(self) -> int: ...
    @property
    def is_normalized(self) -> bool: ...  # by a LayerNorm; a pre-norm residual stream has no bounded scale


class Encoder(Frozen):
    """Patches, positions, extra tokens, then blocks.

    Attributes:
        alibi: The bias of its blocks, if they have one.
        alibi_scale: Learned factors of that bias.
        stem_macs: Multiply-accumulates for one image before the blocks.
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
        self.register_buffer("image_mean", torch.tensor(config.image_mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(config.image_std).view(1, -1, 1, 1), persistent=False)

    @property
    @abstractmethod
    def block_list(self) -> list[FfnBlock]:
        """The blocks, typed."""

    @abstractmethod
    def embed_patches(self, images: Tensor) -> Tensor:
        """Return the first block's input, (B, T, D), from images as in :meth:`forward`."""

    @abstractmethod
    def block_contexts(self, x_BTD: Tensor) -> list[Tensor | None]:
        """Return each block's context, and perhaps those of a teacher's blocks after them."""

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
        """Encode images as :meth:`forward` does, with the gradient of what trains here."""
        x_BTD = self.embed_patches(images)
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
    """Resize as the uint8 kernel does, which only CPUs have: rows, then columns, clamping the overshoot each time."""
    pixels = images.float()
    for each_shape in ((images.shape[-2], shape[1]), shape):
        pixels = interpolate(pixels, each_shape, mode=mode, antialias=True).round().clamp(0, 255)
    return pixels
