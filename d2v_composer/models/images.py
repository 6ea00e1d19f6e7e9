"""The base of image encoders, data2vec 2.0's image encoder, and functions that resize images.

Shapes: B images, N patches, D channels.
"""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear

from d2v_composer.models.configs import ImageConfig, ImageEncoderConfig, height_and_width
from d2v_composer.models.encoder import Data2Vec2Encoder, Encoder, Inputs

SIDE_OF_PIXELS = 32  # CIFAR's

log = logging.getLogger(__name__)


class PatchProjection(nn.Conv2d):
    """A convolution with a stride equal to the kernel size, computed as one matrix product over patches."""

    def forward(self, input: Tensor) -> Tensor:
        height, width = self.kernel_size
        patches = input.unflatten(3, (-1, width)).unflatten(2, (-1, height)).permute(0, 2, 4, 1, 3, 5)
        return linear(patches.flatten(3), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class PixelEncoder(Encoder):
    """Base of image encoders.

    Attributes:
        is_first: True until :meth:`prepare` has checked whether float images are normalized.
    """

    image_mean: Tensor
    image_std: Tensor
    is_first = True
    baseline = "pixels"
    input_name = "images"

    def __init__(self, config: ImageConfig) -> None:
        super().__init__(config)
        self.register_buffer("image_mean", torch.tensor(config.image_mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(config.image_std).view(1, -1, 1, 1), persistent=False)

    def prepare(self, values: Tensor) -> Tensor:
        """Resize and normalize uint8 images; return float images unchanged."""
        channels, size = self.config.in_chans, height_and_width(self.config.image_size)
        is_uint8, is_batch = values.dtype == torch.uint8, values.ndim == 4 and values.shape[1] == channels
        if not is_batch or not (is_uint8 or (values.is_floating_point() and values.shape[2:] == size)):
            raise ValueError(
                f"images must be (B, {channels}, H, W) uint8, or (B, {channels}, {size[0]}, {size[1]}) float and "
                f"normalized; got {tuple(values.shape)} {str(values.dtype).removeprefix('torch.')}"
            )
        if not is_uint8:
            if not torch.compiler.is_compiling() and self.is_first:
                low, high = values.aminmax()
                self.is_first = bool(low == high)
                if 0 <= low < high <= 1:
                    log.warning("expected float images that are normalized, or uint8 images, got floats from 0 to 1")
            return values
        if values.shape[2:] != size:
            values = resize(values, size, self.config.interpolation)
        return values.float().sub_(255 * self.image_mean).div_(255 * self.image_std)

    def normalized(self, values: Tensor) -> Tensor:
        return self.prepare(values)

    def num_tokens(self, shape: Sequence[int] | None = None) -> int:
        return self.config.num_tokens

    def example(self, count: int) -> Tensor:
        return torch.zeros(count, self.config.in_chans, *height_and_width(self.config.image_size))

    def noise(self, count: int) -> Tensor:
        return torch.randint(0, 256, self.example(count).shape, dtype=torch.uint8)

    def baseline_of(self, inputs: Inputs) -> Tensor:
        """Return the normalized pixels, shrunk to at most ``SIDE_OF_PIXELS`` per side, (B, channels)."""
        size = [min(SIDE_OF_PIXELS, side) for side in height_and_width(self.config.image_size)]
        return interpolate(self.prepare(inputs.values), size, mode="area").flatten(1)


class ImageEncoder(PixelEncoder, Data2Vec2Encoder):
    """Data2vec 2.0's image encoder: patch embedding, fixed positions, extra tokens, LayerNorm, blocks."""

    config: ImageEncoderConfig

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__(config)
        dim, patch = config.embed_dim, config.patch_size
        self.local_encoder = nn.ModuleDict({"proj": PatchProjection(config.in_chans, dim, patch, stride=patch)})
        self.fixed_positional_encoder = nn.ParameterDict(
            {"positions": torch.zeros(1, math.prod(config.grid_size), dim)}
        )
        self.add_blocks()

    def embed_tokens(self, inputs: Inputs) -> Tensor:
        x_BND = self.local_encoder["proj"](self.prepare(inputs.values)).flatten(2).transpose(1, 2)
        return self.add_extra_tokens(x_BND + self.fixed_positional_encoder["positions"])


def resize(images: Tensor, shape: tuple[int, int], mode: str) -> Tensor:
    """Resize uint8 images with antialiasing, (B, channels, *shape): uint8 on a CPU, else float32 with whole numbers."""
    if images.device.type == "cpu":
        # The kernel is fastest on channels last, all that follows on contiguous images.
        return interpolate(images, shape, mode=mode, antialias=True).contiguous()
    return resize_in_float(images, shape, mode)


def resize_in_float(images: Tensor, shape: tuple[int, int], mode: str) -> Tensor:
    """Resize the width, then the height, like torch's uint8 kernel for CPUs; return float32 with whole numbers."""
    pixels = images.float()
    for each_shape in ((images.shape[-2], shape[1]), shape):
        pixels = interpolate(pixels, each_shape, mode=mode, antialias=True).round().clamp(0, 255)
    return pixels
