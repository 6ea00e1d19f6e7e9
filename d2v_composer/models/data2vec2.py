"""The teacher of data2vec 2.0: a frozen image model.

Shapes: B images, T time steps, D channels.
Source: data2vec 2.0 (Baevski et al. 2022, arXiv:2212.07525), fairseq ``data2vec2.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

from torch import Tensor, nn

from d2v_composer.models.block import Block
from d2v_composer.models.image_encoder import ImageEncoder, ImageEncoderConfig
from d2v_composer.models.sizes import MAX_DEPTH, check_whole
from d2v_composer.models.student import Init
from d2v_composer.models.teacher import Teacher

__all__ = ["Data2Vec2", "Data2Vec2Config"]


@dataclass(frozen=True, kw_only=True)
class Data2Vec2Config(ImageEncoderConfig):
    """Sizes of a data2vec 2.0 image model."""

    depth: int = 8
    average_top_k_layers: int = 8
    """Number of last blocks in the target, as in pre-training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("depth", self.depth, 1, MAX_DEPTH)
        check_whole("average_top_k_layers", self.average_top_k_layers, 1, self.depth)
        self.check_alibi_scale([self.prenet_depth + self.depth])

    def encoder_config(self) -> ImageEncoderConfig:
        """Return the sizes of the modality encoder alone."""
        return ImageEncoderConfig(**{each.name: getattr(self, each.name) for each in fields(ImageEncoderConfig)})


class Data2Vec2(Teacher):
    """The teacher, frozen and in eval mode.

    Args:
        config: The sizes.
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
