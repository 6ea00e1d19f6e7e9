"""Turn any module that maps images to tokens into a teacher.

Shapes: B images, N tokens, D channels.
"""

from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from d2v_composer.models.configs import FrozenModelConfig, ImageEncoderConfig, height_and_width
from d2v_composer.models.encoder import Inputs, Tokens
from d2v_composer.models.features import Features
from d2v_composer.models.images import ImageEncoder, PixelEncoder
from d2v_composer.models.teacher import Teacher

HEAD_DIM = 64  # channels of a student's attention head


class ModuleEncoder(PixelEncoder):
    """An encoder that calls a module.

    Args:
        module: Maps normalized images, (B, 3, height, width) float, to tokens, (B, N, D).
        config: Preprocessing and sizes.
    """

    def __init__(self, module: nn.Module, config: FrozenModelConfig) -> None:
        super().__init__(config)
        self.module = module

    def embed_tokens(self, inputs: Inputs) -> Tensor:
        return self.module(self.prepare(inputs.values))


class FrozenModel(Teacher):
    """A teacher made from any module that maps images to tokens.

    Args:
        module: Maps images, (B, 3, height, width) float and normalized, to tokens, (B, N, D): CLS if
            ``has_cls_token``, then the patches, row by row.
        source: Origin of the module's weights.
        license: License of the module's weights, if stated.
        embedding: Name of the teacher's embedding, such as ``output_mean``; default: ``output_cls`` or, without CLS,
            ``output_mean``.
        **sizes: ``image_size``, pixels per side or (height, width); ``grid_size``, rows and columns of patches;
            ``has_cls_token``, true if the first token is CLS; ``image_mean`` and ``image_std`` of each channel, for
            pixels from 0 to 1, by default ImageNet's.

    Raises:
        ValueError: The module's output has an unexpected shape or is not finite, or an argument is out of range.

    Example:
        >>> class Grid(torch.nn.Module):  # patches without CLS
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.patches = torch.nn.Conv2d(3, 96, 8, 8)
        ...
        ...     def forward(self, images):
        ...         return self.patches(images).flatten(2).transpose(1, 2)
        >>> teacher = FrozenModel(Grid(), image_size=32, grid_size=(4, 4), has_cls_token=False, source="random")
        >>> student = teacher.build_student(depth=2)  # or model="timm/resnet18"
        >>> student.embed(images).shape
        torch.Size([2, 96])
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        source: str,
        license: str | None = None,
        embedding: str | None = None,
        **sizes: Any,
    ) -> None:
        config = FrozenModelConfig(embed_dim=1, **sizes)
        shape = 1, 3, *height_and_width(config.image_size)
        with torch.no_grad():
            tokens = module.eval()(torch.zeros(shape))
        found = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        if len(found) != 3 or found[:2] != (1, config.num_tokens):
            raise ValueError(f"the module must map images {shape} to tokens (1, {config.num_tokens}, D), got {found}")
        config = config.changed(embed_dim=tokens.shape[2])
        super().__init__(ModuleEncoder(module, config), config)
        self.provenance = {"source": source, "license": license}
        self.name_embedding(embedding)
        self.freeze().identify()

    def features(self, tokens: Tokens) -> Features:
        return Features.of_layer(tokens.x, self.num_extra_tokens, self.has_cls_token)

    def cast_weights(self, dtype: torch.dtype) -> Self:
        return self  # foreign code may not expect cast weights

    def student_encoder(self) -> ImageEncoder:
        """Build a trainable image encoder without blocks, with the teacher's number of tokens."""
        shape, (rows, columns), dim = height_and_width(self.config.image_size), self.config.grid_size, self.embed_dim
        if shape[0] != shape[1] or rows != columns or shape[0] % rows:
            raise ValueError(
                "a student with new blocks needs a teacher with square images and a square grid of patches of whole "
                f"pixels, got a grid of {rows} x {columns} for {shape[0]} x {shape[1]} pixels; a student with model "
                "timm/NAME needs no such grid"
            )
        config = ImageEncoderConfig(
            embed_dim=dim,
            num_heads=gcd(dim, max(1, dim // HEAD_DIM)),
            prenet_depth=0,
            num_extra_tokens=self.num_extra_tokens,
            image_size=shape[0],
            patch_size=shape[0] // rows,
            **self.config.model_dump(include={"image_mean", "image_std"}),
        )
        return ImageEncoder(config)
