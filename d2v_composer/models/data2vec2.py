"""Frozen teachers: data2vec 2.0 for images and for audio, and EAT.

Shapes: B inputs, T tokens, D channels.
Source: data2vec 2.0 (Baevski et al. 2022, arXiv:2212.07525), fairseq ``data2vec2.py``.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from d2v_composer.models.attention import Block
from d2v_composer.models.audio import AudioEncoder, EatEncoder
from d2v_composer.models.backbone import Transformer
from d2v_composer.models.configs import (
    AudioEncoderConfig,
    Config,
    EatEncoderConfig,
    ImageEncoderConfig,
    TeacherConfig,
    check_whole,
)
from d2v_composer.models.encoder import Data2Vec2Encoder
from d2v_composer.models.images import ImageEncoder
from d2v_composer.models.provenance import Record
from d2v_composer.models.student import Init
from d2v_composer.models.teacher import Teacher

ENCODERS: dict[type[Config], type[Data2Vec2Encoder]] = {
    ImageEncoderConfig: ImageEncoder,
    AudioEncoderConfig: AudioEncoder,
    EatEncoderConfig: EatEncoder,
}


class Data2Vec2(Transformer, Teacher):
    """A data2vec 2.0 or EAT teacher, frozen and in eval mode.

    Args:
        config: Sizes.
        provenance: See :class:`~d2v_composer.models.teacher.Teacher`.
    """

    config: TeacherConfig
    encoder: Data2Vec2Encoder

    def __init__(self, config: TeacherConfig, provenance: Record | None = None) -> None:
        hidden_dim = int(config.embed_dim * config.mlp_ratio)
        blocks = [Block(config.embed_dim, config.num_heads, hidden_dim, config.norm_eps) for _ in range(config.depth)]
        super().__init__(ENCODERS[type(config.encoder)](config.encoder), blocks, config, provenance)
        self.name_embedding(self.provenance.get("embedding"))
        self.freeze()

    def block_contexts(self, x_BTD: Tensor, padding_mask: Tensor | None = None) -> list[Tensor | None]:
        prenet_depth = self.encoder.config.prenet_depth
        layers = range(prenet_depth, prenet_depth + self.config.depth)
        return self.encoder.block_contexts(x_BTD, padding_mask, layers)

    def share_blocks(self, first_blocks: int) -> None:
        """Move blocks between encoder and teacher, until the encoder has ``first_blocks`` blocks.

        Raises:
            ValueError: ``first_blocks`` is negative, or leaves no block after the encoder.
        """
        blocks = [*self.encoder.block_list, *self.block_list]
        check_whole("first_blocks", first_blocks, 0, len(blocks) - 1)
        depth = len(blocks) - first_blocks
        top_k = min(self.config.average_top_k_layers, depth)
        encoder = self.encoder.config.changed(prenet_depth=first_blocks)
        self.config = self.config.changed(encoder=encoder, depth=depth, average_top_k_layers=top_k)
        self.encoder.config = encoder
        self.encoder.context_encoder["blocks"] = nn.ModuleList(blocks[:first_blocks])
        self.blocks = nn.ModuleList(blocks[first_blocks:])
        self.freeze()

    def init_sources(self, init: Init) -> Sequence[nn.Module]:
        return [block.attn for block in self.block_list] if init == "teacher_attention" else self.block_list
