"""The data2vec 2.0 image teacher and its encoder, both frozen.

Shapes: B images, T tokens, D channels.
Source: data2vec 2.0 (Baevski et al. 2022, arXiv:2212.07525), fairseq ``data2vec2.py``.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from d2v_composer.models.attention import Block
from d2v_composer.models.encoder import Encoder, PatchProjection, build_alibi
from d2v_composer.models.sizes import Data2Vec2Config, ImageEncoderConfig, check_whole, encoder_config
from d2v_composer.models.student import Init
from d2v_composer.models.teacher import Teacher


class ImageEncoder(Encoder):
    """Patch embedding, fixed positions, extra tokens, LayerNorm, ``prenet_depth`` blocks."""

    config: ImageEncoderConfig

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__(config)
        dim, patch = config.embed_dim, config.patch_size
        self.stem_macs = config.num_patches * dim * config.in_chans * patch**2
        self.local_encoder = nn.ModuleDict({"proj": PatchProjection(config.in_chans, dim, patch, stride=patch)})
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
    def block_list(self) -> list[Any]:
        return list(cast("nn.ModuleList", self.context_encoder["blocks"]))

    def embed_patches(self, images: Tensor) -> Tensor:
        x_BND = self.local_encoder["proj"](self.prepare(images)).flatten(2).transpose(1, 2)
        x_BTD = x_BND + self.fixed_positional_encoder["positions"]
        if self.extra_tokens is not None:
            x_BTD = torch.cat([self.extra_tokens.expand(x_BTD.shape[0], -1, -1), x_BTD], dim=1)
        return self.context_encoder["norm"](x_BTD)

    def block_contexts(self, x_BTD: Tensor, num_layers: int | None = None) -> list[Tensor | None]:
        """Return the attention biases of this encoder's blocks and of the teacher's blocks after them."""
        num_layers = self.config.prenet_depth if num_layers is None else num_layers
        if self.alibi is None:
            return [None] * num_layers
        if self.alibi_scale is None or len(self.alibi_scale) == 1:
            scale = None if self.alibi_scale is None else self.alibi_scale[0]
            return [self.alibi(x_BTD, scale)] * num_layers
        return [self.alibi(x_BTD, layer_scale) for layer_scale in self.alibi_scale]


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
        super().__init__(ImageEncoder(encoder_config(ImageEncoderConfig, config)), blocks, config, provenance)
        self.freeze()

    def block_contexts(self, x_BTD: Tensor) -> list[Tensor | None]:
        prenet_depth = self.config.prenet_depth
        return self.encoder.block_contexts(x_BTD, prenet_depth + self.config.depth)[prenet_depth:]

    def share_blocks(self, first_blocks: int) -> None:
        """Move blocks between encoder and teacher until the encoder has the given number.

        Raises:
            ValueError: ``first_blocks`` leaves no block to the teacher.
        """
        blocks = [*self.encoder.block_list, *self.block_list]
        check_whole("first_blocks", first_blocks, 0, len(blocks) - 1)
        depth = len(blocks) - first_blocks
        top_k = min(self.config.average_top_k_layers, depth)
        self.config = replace(self.config, prenet_depth=first_blocks, depth=depth, average_top_k_layers=top_k)
        self.encoder.config = encoder_config(ImageEncoderConfig, self.config)
        self.encoder.context_encoder["blocks"] = nn.ModuleList(blocks[:first_blocks])
        self.blocks = nn.ModuleList(blocks[first_blocks:])
        self.freeze()

    def init_sources(self, init: Init) -> Sequence[nn.Module]:
        return [block.attn for block in self.block_list] if init == "teacher_attention" else self.block_list
