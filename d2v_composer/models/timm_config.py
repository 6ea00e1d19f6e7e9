"""Sizes of a timm encoder, for readers of files that import no timm: that takes seconds."""

import math
from dataclasses import dataclass
from typing import Literal

from d2v_composer.models.encoder import ImageSize, check_choice, check_pixel_statistics

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
    # The same for all, and thus not stored.
    is_normalized = False
    norm_eps = 1e-6

    def __post_init__(self) -> None:
        # Only what a file says of itself; TimmEncoder compares all other fields with timm's model.
        check_pixel_statistics(self.in_chans, self.image_mean, self.image_std)
        check_choice("interpolation", self.interpolation, Literal["bicubic", "bilinear"])

    @property
    def prenet_depth(self) -> int:
        """:attr:`first_blocks`, under data2vec's name."""
        return self.first_blocks

    @property
    def num_tokens(self) -> int:
        return self.num_extra_tokens + math.prod(self.grid_size)
