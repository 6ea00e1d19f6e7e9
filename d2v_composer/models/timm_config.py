"""Sizes of a timm encoder, for readers of files that import no timm: that takes seconds."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from d2v_composer.models.encoder import (
    MAX_DEPTH,
    ImageSize,
    check_choice,
    check_number,
    check_pixel_statistics,
    check_whole,
    height_and_width,
    parse_image_size,
)

NUM_OUTPUTS = 32
"""Outputs of an encoder in an exported file."""


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
    """Version of timm that built it."""
    outputs: tuple[float, ...] = ()
    """A few numbers that it computes from a fixed image, in an exported file. Another version of timm may silently
    build something else under the same name."""

    def __post_init__(self) -> None:
        # Only what a file says of itself; TimmEncoder compares all other fields with timm's model.
        check_whole("first_blocks", self.first_blocks, 0, MAX_DEPTH)
        if not isinstance(self.model, str):
            raise ValueError(f"model must be timm/NAME, got {self.model!r}")
        if parse_image_size(self.image_size) != self.image_size:
            raise ValueError(f"image_size must be one number for a square, else two, got {self.image_size!r}")
        check_pixel_statistics(self.in_chans, self.image_mean, self.image_std)
        check_choice("interpolation", self.interpolation, Literal["bicubic", "bilinear"])
        if not isinstance(self.timm, str) or not re.fullmatch(r"[\w.+-]{1,50}", self.timm):
            raise ValueError(f"timm must be a version, got {self.timm!r}")
        if not isinstance(self.outputs, tuple) or len(self.outputs) not in (0, NUM_OUTPUTS):
            raise ValueError(f"outputs must be {NUM_OUTPUTS} numbers, or none")
        for each in self.outputs:
            check_number("outputs", each, -1e30, 1e30)

    @property
    def is_normalized(self) -> bool:
        return False

    @property
    def norm_eps(self) -> float:
        return 1e-6

    @property
    def patch_size(self) -> int:
        return height_and_width(self.image_size)[0] // self.grid_size[0]

    @property
    def prenet_depth(self) -> int:
        """:attr:`first_blocks`, under data2vec's name."""
        return self.first_blocks

    @property
    def num_tokens(self) -> int:
        return self.num_extra_tokens + math.prod(self.grid_size)
