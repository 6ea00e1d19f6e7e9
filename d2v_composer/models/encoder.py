"""An encoder: images to time steps, frozen, shared by teacher and student.

Shapes: B images, S pixels a side (or height and width), N patches, E extra tokens, T = E + N time steps, D channels.
"""

from abc import abstractmethod
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from typing_extensions import Self

from d2v_composer.models.attention import Alibi, FfnBlock, manhattan_distance

# MERGED FROM d2v_composer/models/encoder.py: Modules that do not train.


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


# MERGED FROM d2v_composer/models/encoder.py: Limits for the sizes of a model, and checks of sizes from files.

ImageSize = int | tuple[int, int]
"""Pixels a side of a square, or (height, width)."""

# Far above any vision transformer's. Larger ones mean a corrupt file, or one that would exhaust the memory.
MAX_WIDTH = 1 << 16
MAX_DEPTH = 1000
MAX_PATCHES = 1 << 14
# Allowed means and standard deviations of pixels from 0 to 1.
MEAN_RANGE, STD_RANGE = (0.0, 1.0), (1e-3, 1.0)


def check_whole(name: str, value: int, minimum: int, maximum: int) -> None:
    """Check that a size is a whole number within a range.

    Raises:
        ValueError: It is not; the message names the size.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
        raise ValueError(f"{name} must be a whole number from {minimum} to {maximum}, got {value!r}")


def check_mlp_ratio(mlp_ratio: float, embed_dim: int) -> None:
    """Check that a ratio gives a valid number of hidden units.

    Raises:
        ValueError: It does not.
    """
    if not is_number(mlp_ratio, 0, MAX_WIDTH) or not 1 <= mlp_ratio * embed_dim <= MAX_WIDTH:
        raise ValueError(
            f"mlp_ratio must give from 1 to {MAX_WIDTH} hidden units for a width of {embed_dim}, got {mlp_ratio!r}"
        )


def check_channels(name: str, values: Any, in_chans: int, limits: tuple[float, float]) -> None:
    """Check that a size is a number within a range for each channel of an image.

    Raises:
        ValueError: It is not; the message names the size.
    """
    minimum, maximum = limits
    if not isinstance(values, tuple) or len(values) != in_chans:
        raise ValueError(f"{name} must be a number for each of in_chans {in_chans}, got {values!r}")
    if not all(is_number(value, minimum, maximum) for value in values):
        raise ValueError(f"{name} must be numbers from {minimum:g} to {maximum:g}, got {values!r}")


def is_number(value: Any, minimum: float, maximum: float) -> bool:
    """Return whether a value is a number within a range; a bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and minimum <= value <= maximum


def height_and_width(image_size: ImageSize) -> tuple[int, int]:
    """Return (height, width) in pixels."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size


class EncoderConfig(Protocol):
    """Sizes of an encoder."""

    @property
    def embed_dim(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def norm_eps(self) -> float:
        """For a student's LayerNorms too."""
        ...

    @property
    def num_extra_tokens(self) -> int:
        """Tokens before the patches: CLS and registers."""
        ...

    @property
    def has_cls_token(self) -> bool:
        """True if the first extra token is CLS; some models have registers only."""
        ...

    @property
    def image_size(self) -> ImageSize: ...
    @property
    def in_chans(self) -> int: ...
    @property
    def image_mean(self) -> tuple[float, ...]: ...
    @property
    def image_std(self) -> tuple[float, ...]: ...
    @property
    def interpolation(self) -> str:
        """``bicubic`` or ``bilinear``, for resizing images."""
        ...

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        ...

    @property
    def num_steps(self) -> int:
        """T."""
        ...

    @property
    def is_normalized(self) -> bool:
        """True if the output comes from a LayerNorm; the scale of a pre-norm residual stream has no bound."""
        ...


class Encoder(Frozen):
    """Patches, positions, extra tokens, then blocks.

    Attributes:
        alibi: The bias of its blocks, if they have one.
        alibi_scale: Learned factors of that bias.
    """

    image_mean: Tensor
    image_std: Tensor
    alibi: Alibi | None
    alibi_scale: Tensor | None

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
        """Return the first block's input, (B, T, D), of images as in :meth:`forward`."""

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
        """Encode images as :meth:`forward` does, with the gradient of what is trained here."""
        x_BTD = self.embed_patches(images)
        for block, context in zip(self.block_list, self.block_contexts(x_BTD), strict=False):
            x_BTD, _ = block(x_BTD, context)
        return x_BTD

    def prepare(self, images: Tensor) -> Tensor:
        """Resize and normalize uint8 images; return float images unchanged.

        Raises:
            ValueError: The images have another shape or dtype.
        """
        self.check_images(images)
        if images.dtype != torch.uint8:
            return images
        shape = height_and_width(self.config.image_size)
        if images.shape[-2:] != shape:
            images = resize(images, shape, self.config.interpolation)
        return images.float().sub_(255 * self.image_mean).div_(255 * self.image_std)

    def check_images(self, images: Tensor) -> None:
        """Refuse images that :meth:`forward` cannot encode.

        Raises:
            ValueError: Names the shape that is expected, and the one found.
        """
        channels, size, shape = self.config.in_chans, height_and_width(self.config.image_size), tuple(images.shape)
        is_uint8 = images.dtype == torch.uint8
        is_batch = len(shape) == 4 and shape[1] == channels
        if is_batch and (is_uint8 or (images.is_floating_point() and shape[2:] == size)):
            return
        hint = ""
        if len(shape) == 3 and shape[0] == channels:
            hint = "; for one image: images[None]"
        elif len(shape) == 4 and shape[3] == channels and not is_batch:
            hint = "; for channels last: images.permute(0, 3, 1, 2)"
        raise ValueError(
            f"images must be (B, {channels}, H, W) uint8, or (B, {channels}, {size[0]}, {size[1]}) float and "
            f"normalized; got {shape} {str(images.dtype).removeprefix('torch.')}{hint}"
        )

    def forward_macs(self) -> int:
        """Return the multiply-accumulates for one image."""
        return self.stem_macs + sum(block.forward_macs(self.config.num_steps) for block in self.block_list)

    @cached_property  # a speed monitor asks in every batch
    def stem_macs(self) -> int:
        """Those of what comes before the blocks: one convolution of the patches."""
        config = self.config
        rows, columns = config.grid_size
        height, width = height_and_width(config.image_size)
        pixels_of_a_patch = (height // rows) * (width // columns)
        return rows * columns * config.embed_dim * config.in_chans * pixels_of_a_patch


def build_alibi(config: EncoderConfig, num_heads: int, num_alibi_heads: int) -> Alibi | None:
    """Build 2-D ALiBi for blocks on this encoder's grid; ``None`` for 0 ALiBi heads."""
    if not num_alibi_heads:
        return None
    return Alibi(
        partial(manhattan_distance, num_columns=config.grid_size[1]),
        num_heads=num_heads,
        num_alibi_heads=num_alibi_heads,
        num_extra_tokens=config.num_extra_tokens,
    )


def resize(images: Tensor, shape: tuple[int, int], mode: str) -> Tensor:
    """Resize uint8 images to (B, 3, *shape) with antialiasing; whole numbers from 0 to 255."""
    if images.device.type == "cpu":
        # The kernel is fastest on channels last, all that follows on contiguous images.
        return interpolate(images, shape, mode=mode, antialias=True).contiguous()
    return resize_in_float(images, shape, mode)


def resize_in_float(images: Tensor, shape: tuple[int, int], mode: str) -> Tensor:
    """Resize like :func:`resize` without its uint8 kernel: rows, then columns, each time clamping the overshoot."""
    pixels = images.float()
    for each_shape in ((images.shape[-2], shape[1]), shape):
        pixels = interpolate(pixels, each_shape, mode=mode, antialias=True).round().clamp(0, 255)
    return pixels
