"""Sizes of timm's ViTs as encoders and teachers; this module does not import timm, which takes seconds."""

import re
from dataclasses import dataclass, fields
from typing import Any

from d2v_composer.models.sizes import (
    MAX_DEPTH,
    MAX_WIDTH,
    MEAN_RANGE,
    STD_RANGE,
    ImageSize,
    check_channels,
    check_whole,
    height_and_width,
    is_number,
)

__all__ = ["NUM_OUTPUTS", "PREFIX", "TimmEncoderConfig", "TimmTeacherConfig", "parse_image_size"]

PREFIX = "timm/"
INTERPOLATIONS = ("bicubic", "bilinear")
# Of the students.
NORM_EPS = 1e-6
NUM_OUTPUTS = 32
"""How many of an encoder's outputs an exported file has."""


@dataclass(frozen=True, kw_only=True)
class TimmEncoderConfig:
    """Sizes of a timm ViT's encoder. The model's name gives all others.

    Raises:
        ValueError: A size is out of range.
    """

    model: str
    """``timm/NAME``, NAME as ``timm.create_model`` takes it."""
    first_blocks: int
    """Number of blocks in the encoder."""
    embed_dim: int
    num_heads: int
    num_extra_tokens: int
    has_cls_token: bool
    image_size: ImageSize
    grid_size: tuple[int, int]
    in_chans: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    interpolation: str
    timm: str
    """The version of timm that built it."""
    outputs: tuple[float, ...] = ()
    """A few numbers of what it computes of a fixed image, in an exported file: another version of timm may build
    something else under the same name."""

    def __post_init__(self) -> None:
        if not isinstance(self.model, str):
            raise ValueError(f"model must be timm/NAME, got {self.model!r}")
        check_whole("first_blocks", self.first_blocks, 0, MAX_DEPTH)
        if parse_image_size(self.image_size) != self.image_size:
            raise ValueError(f"image_size must be one number for a square, else two, got {self.image_size!r}")
        check_whole("in_chans", self.in_chans, 1, MAX_WIDTH)
        check_channels("image_mean", self.image_mean, self.in_chans, MEAN_RANGE)
        check_channels("image_std", self.image_std, self.in_chans, STD_RANGE)
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be {' or '.join(INTERPOLATIONS)}, got {self.interpolation!r}")
        if not isinstance(self.timm, str) or not re.fullmatch(r"[\w.+-]{1,50}", self.timm):
            raise ValueError(f"timm must be a version, got {self.timm!r}")
        if not isinstance(self.outputs, tuple) or len(self.outputs) not in (0, NUM_OUTPUTS):
            raise ValueError(f"outputs must be {NUM_OUTPUTS} numbers, or none")
        if not all(is_number(each, -1e30, 1e30) for each in self.outputs):
            raise ValueError("outputs must be numbers")

    @property
    def is_normalised(self) -> bool:
        return False

    @property
    def norm_eps(self) -> float:
        return NORM_EPS

    @property
    def patch_size(self) -> int:
        return height_and_width(self.image_size)[0] // self.grid_size[0]

    @property
    def prenet_depth(self) -> int:
        """:attr:`first_blocks`, under data2vec's name."""
        return self.first_blocks

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    @property
    def num_steps(self) -> int:
        return self.num_extra_tokens + self.num_patches


@dataclass(frozen=True, kw_only=True)
class TimmTeacherConfig(TimmEncoderConfig):
    """Sizes of a timm ViT."""

    depth: int
    """Number of blocks after the encoder."""

    @property
    def average_top_k_layers(self) -> int:
        """All blocks."""
        return self.depth

    def encoder_config(self) -> TimmEncoderConfig:
        """Return the sizes of the encoder alone."""
        return TimmEncoderConfig(**{each.name: getattr(self, each.name) for each in fields(TimmEncoderConfig)})


def parse_image_size(image_size: Any) -> ImageSize:
    """Return an image size from any source: pixels a side, or (height, width) if they differ.

    Raises:
        ValueError: It is neither a number of pixels, nor two, nor text such as '112x168'.
    """
    if isinstance(image_size, str) and re.fullmatch(r"\d{1,9}(x\d{1,9})?", image_size):
        image_size = tuple(map(int, image_size.split("x")))
    elif isinstance(image_size, str):
        raise ValueError(f"image_size must be a number of pixels or HEIGHTxWIDTH, got {image_size!r}")
    shape: Any = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    if len(shape) not in (1, 2):
        raise ValueError(f"image_size must be a whole number, or height and width, got {image_size!r}")
    for size in shape:
        check_whole("image_size", size, 1, MAX_WIDTH)
    return shape[0] if shape[0] == shape[-1] else (shape[0], shape[-1])
