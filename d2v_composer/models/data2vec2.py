"""The teacher of data2vec 2.0: a frozen image model.

Any teacher has ``encode``, ``forward_blocks``, ``targets``, ``build_student``, ``config`` and ``provenance``.

Shapes: B images, E extra tokens, N patches, T = E + N time steps, D channels.
Source: data2vec 2.0 (Baevski et al. 2022, arXiv:2212.07525), fairseq ``data2vec2.py``.
"""

from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from d2v_composer.models.block import Block
from d2v_composer.models.frozen import Frozen
from d2v_composer.models.image_encoder import ImageEncoder, ImageEncoderConfig
from d2v_composer.models.sizes import MAX_DEPTH, check_whole
from d2v_composer.models.student import Init, Student, StudentConfig, init_from_teacher
from d2v_composer.models.transformer import Transformer

__all__ = ["Data2Vec2", "Data2Vec2Config", "ExtraTokens"]

ExtraTokens = Literal["regress", "drop"]


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
        return ImageEncoderConfig(**{name: getattr(self, name) for name in ImageEncoderConfig.__dataclass_fields__})


class Data2Vec2(Transformer, Frozen):
    """The teacher, frozen and in eval mode.

    Args:
        config: The sizes.
        provenance: Origin of the weights, stored with what is derived from them.
    """

    def __init__(self, config: Data2Vec2Config, provenance: dict[str, Any] | None = None) -> None:
        hidden_dim = int(config.embed_dim * config.mlp_ratio)
        blocks = [Block(config.embed_dim, config.num_heads, hidden_dim, config.norm_eps) for _ in range(config.depth)]
        super().__init__(ImageEncoder(config.encoder_config()), blocks)
        self.config = config
        self.provenance = provenance or {}
        self.freeze()

    def block_biases(self, x_BTD: Tensor) -> list[Tensor | None]:
        prenet_depth = self.config.prenet_depth
        return self.encoder.layer_biases(x_BTD, prenet_depth + self.config.depth)[prenet_depth:]

    @torch.no_grad()
    def targets(
        self, x: Tensor, extra_tokens: ExtraTokens = "regress", average_top_k_layers: int | None = None
    ) -> Tensor:
        """Compute the regression targets: norm_mean of the last blocks' FFN outputs.

        Args:
            x: (B, T, D), from :meth:`encode`.
            extra_tokens: ``regress`` them like patches, or ``drop`` them before InstanceNorm, as data2vec 2.0's
                pre-training does.
            average_top_k_layers: Number of last blocks; default the checkpoint's (all of base's, 18 of large's 24, 24
                of huge's 32).

        Returns:
            (B, T, D) float32, or (B, N, D) without the extra tokens.

        Raises:
            ValueError: There are fewer blocks.
        """
        depth = self.config.depth
        top_k = self.config.average_top_k_layers if average_top_k_layers is None else average_top_k_layers
        if not 1 <= top_k <= depth:
            raise ValueError(f"average_top_k_layers must be from 1 to the teacher's depth {depth}, got {top_k}")
        layers = islice(self.ffn_outputs(x), depth - top_k, None)
        if extra_tokens == "regress":
            return self.norm_mean(layers)
        return self.norm_mean(layer_BTD[:, self.num_extra_tokens :] for layer_BTD in layers)

    def build_student(
        self,
        depth: int = 5,
        mlp_ratio: float = 3.0,
        alibi: bool = True,
        init: Init = "random",
        num_heads: int | None = None,
        num_alibi_heads: int | None = None,
    ) -> Student:
        """Build a trainable student that shares this teacher's encoder.

        Args:
            depth: Number of blocks.
            mlp_ratio: Hidden width of their MLPs over D.
            alibi: Add the 2-D ALiBi bias to the attention, as in the paper, though the teacher has none.
            init: ``random`` (the paper), or copy the teacher's first blocks: ``teacher_attention``, or
                ``teacher_blocks`` if the MLP ratios agree.
            num_heads: Default: the teacher's.
            num_alibi_heads: Default: all heads.

        Raises:
            ValueError: A size is out of range or, for a copy, differs from the teacher's.
        """
        num_heads = self.config.num_heads if num_heads is None else num_heads
        num_alibi_heads = num_heads if num_alibi_heads is None else num_alibi_heads
        config = StudentConfig(
            depth=depth, mlp_ratio=mlp_ratio, num_heads=num_heads, num_alibi_heads=num_alibi_heads if alibi else 0
        )
        student = Student(self.encoder, config, provenance={"teacher": self.provenance})
        if init != "random":
            init_from_teacher(student, self, init)
        return student
