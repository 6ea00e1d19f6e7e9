"""The data2vec 2.0 image teacher and its encoder, both frozen.

Shapes: B images, T tokens, D channels.
Source: data2vec 2.0 (Baevski et al. 2022, arXiv:2212.07525), fairseq ``data2vec2.py``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from reprlib import repr as short
from typing import Any, cast

import torch
from torch import Tensor, nn

from d2v_composer.models.attention import Block, FfnBlock
from d2v_composer.models.encoder import (
    MAX_DEPTH,
    MAX_WIDTH,
    Encoder,
    build_alibi,
    check_number,
    check_pixel_statistics,
    check_whole,
)
from d2v_composer.models.student import Init
from d2v_composer.models.teacher import Teacher

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
    # The same for all, and thus not stored.
    interpolation = "bicubic"
    is_normalized = True

    def __post_init__(self) -> None:
        # A strict load of the tensors finds all other wrong sizes.
        check_whole("num_heads", self.num_heads, 1, MAX_WIDTH)
        check_whole("num_alibi_heads", self.num_alibi_heads, 0, self.num_heads)
        check_whole("prenet_depth", self.prenet_depth, 0, MAX_DEPTH)
        check_number("norm_eps", self.norm_eps, math.ulp(0), 1e-2)
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads must divide embed_dim, got {self.num_heads} heads for {short(self.embed_dim)}")
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size must divide image_size, got {self.patch_size} for {self.image_size}")
        check_pixel_statistics(self.in_chans, self.image_mean, self.image_std)
        shape, heads = self.alibi_scale_shape, self.num_alibi_heads
        if shape is not None and (not heads or shape[1:] not in [(1, each, 1, 1) for each in (1, heads)]):
            expected = f"(blocks or 1, 1, {heads} or 1, 1, 1), null without ALiBi"
            raise ValueError(f"alibi_scale_shape must be {expected}, got {short(shape)}")

    @property
    def has_cls_token(self) -> bool:
        """True if there are extra tokens. The first is CLS."""
        return self.num_extra_tokens > 0

    @property
    def grid_size(self) -> tuple[int, int]:
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        return math.prod(self.grid_size)

    @property
    def num_tokens(self) -> int:
        return self.num_extra_tokens + self.num_patches


class ImageEncoder(Encoder):
    """Patch embedding, fixed positions, extra tokens, LayerNorm, ``prenet_depth`` blocks."""

    config: ImageEncoderConfig

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__(config)
        dim, patch = config.embed_dim, config.patch_size
        self.stem_macs = config.num_patches * dim * config.in_chans * patch**2
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
        self.alibi = build_alibi(config, config.num_heads, config.num_alibi_heads)
        self.alibi_scale = nn.Parameter(torch.ones(config.alibi_scale_shape)) if config.alibi_scale_shape else None

    @property
    def block_list(self) -> list[FfnBlock]:
        return cast("list[FfnBlock]", list(cast("nn.ModuleList", self.context_encoder["blocks"])))

    def embed_patches(self, images: Tensor) -> Tensor:
        x_BND = self.local_encoder["proj"](self.prepare(images)).flatten(2).transpose(1, 2)
        x_BTD = x_BND + self.fixed_positional_encoder["positions"]
        if self.extra_tokens is not None:
            x_BTD = torch.cat([self.extra_tokens.expand(x_BTD.shape[0], -1, -1), x_BTD], dim=1)
        return self.context_encoder["norm"](x_BTD)

    def block_contexts(self, x_BTD: Tensor, num_layers: int | None = None) -> list[Tensor | None]:
        """Return the attention biases of this encoder's blocks and of the teacher's blocks after them.

        Args:
            x_BTD: Input of the blocks.
            num_layers: Number of blocks; default ``prenet_depth``.
        """
        num_layers = self.config.prenet_depth if num_layers is None else num_layers
        if self.alibi is None:
            return [None] * num_layers
        if self.alibi_scale is None or len(self.alibi_scale) == 1:
            scale = None if self.alibi_scale is None else self.alibi_scale[0]
            return [self.alibi(x_BTD, scale)] * num_layers
        return [self.alibi(x_BTD, layer_scale) for layer_scale in self.alibi_scale]


@dataclass(frozen=True, kw_only=True)
class Data2Vec2Config(ImageEncoderConfig):
    """Sizes of a data2vec 2.0 image model."""

    depth: int = 8
    average_top_k_layers: int = 8
    """Number of last blocks in the target, as in pre-training."""

    def __post_init__(self) -> None:
        check_whole("depth", self.depth, 1, MAX_DEPTH)
        super().__post_init__()
        check_whole("average_top_k_layers", self.average_top_k_layers, 1, self.depth)
        shape, num_blocks = self.alibi_scale_shape, self.prenet_depth + self.depth
        if shape is not None and shape[0] not in (1, num_blocks):
            raise ValueError(f"alibi_scale_shape must be for {num_blocks} blocks or 1, got {short(shape)}")

    def encoder_config(self) -> ImageEncoderConfig:
        """Return the sizes of the modality encoder alone."""
        return ImageEncoderConfig(**{each.name: getattr(self, each.name) for each in fields(ImageEncoderConfig)})


class Data2Vec2(Teacher):
    """A data2vec 2.0 teacher, frozen and in eval mode.

    Args:
        config: Sizes.
        provenance: Origin of the weights, stored with what is derived from them.
    """

    config: Data2Vec2Config
    encoder: ImageEncoder

    def __init__(self, config: Data2Vec2Config, provenance: dict[str, Any] | None = None) -> None:
        hidden_dim = int(config.embed_dim * config.mlp_ratio)
        blocks = [Block(config.embed_dim, config.num_heads, hidden_dim, config.norm_eps) for _ in range(config.depth)]
        super().__init__(ImageEncoder(config.encoder_config()), blocks, config, provenance)
        self.freeze()

    @property
    def block_list(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def block_contexts(self, x_BTD: Tensor) -> list[Tensor | None]:
        prenet_depth = self.config.prenet_depth
        return self.encoder.block_contexts(x_BTD, prenet_depth + self.config.depth)[prenet_depth:]

    def share_blocks(self, first_blocks: int) -> None:
        """Move blocks between encoder and teacher until the encoder has this many of them all.

        Raises:
            ValueError: ``first_blocks`` leaves no block to the teacher.
        """
        blocks = [*self.encoder.block_list, *self.block_list]
        check_whole("first_blocks", first_blocks, 0, len(blocks) - 1)
        depth = len(blocks) - first_blocks
        top_k = min(self.config.average_top_k_layers, depth)
        self.config = replace(self.config, prenet_depth=first_blocks, depth=depth, average_top_k_layers=top_k)
        self.encoder.config = self.config.encoder_config()
        self.encoder.context_encoder["blocks"] = nn.ModuleList(blocks[:first_blocks])
        self.blocks = nn.ModuleList(blocks[first_blocks:])
        self.freeze()

    def init_sources(self, init: Init) -> Sequence[nn.Module]:
        return [block.attn for block in self.block_list] if init == "teacher_attention" else self.block_list
