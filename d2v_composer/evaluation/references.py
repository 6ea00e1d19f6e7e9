"""Embed with models on one encoder and with the baselines that they are compared with, each image encoded once.

Shapes: B images, D channels.
"""

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.weak import WeakIdKeyDictionary

from d2v_composer.evaluation.embed_function import Embed
from d2v_composer.models.encoder import Encoder
from d2v_composer.models.sizes import height_and_width
from d2v_composer.models.transformer import Transformer, poolings

__all__ = ["WITHOUT_MODEL", "EncodeOnce", "build_embeds", "pixels"]

WITHOUT_MODEL = ("pixels",)
"""Names of the embed functions of :func:`build_embeds` that run no model."""


class EncodeOnce:
    """Encode images for several models: a tensor that is passed again is not encoded again.

    A result lives as long as its images. Only for evaluations: autocast must be the same for all models.

    Args:
        encode: Images → the encoder's output.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor]) -> None:
        self.encode = encode
        self.encoded = WeakIdKeyDictionary()

    def __call__(self, images: Tensor) -> Tensor:
        if images not in self.encoded:
            self.encoded[images] = self.encode(images)
        return self.encoded[images]


def build_embeds(encoder: Encoder, models: Mapping[str, Transformer]) -> dict[str, Embed]:
    """Return embed functions: ``pixels``, ``encoder`` (its output in every pooling), and those of models on it."""
    encode = EncodeOnce(encoder)

    def embed_with_encoder(images: Tensor) -> dict[str, Tensor]:
        return poolings(encode(images), "output", encoder.config)

    def embed_with(model: Transformer, images: Tensor) -> dict[str, Tensor]:
        return model.embed_encoded(encode(images))

    embeds = {name: partial(embed_with, model) for name, model in models.items()}
    return {"pixels": partial(pixels, encoder), "encoder": embed_with_encoder, **embeds}


def pixels(encoder: Encoder, images: Tensor) -> Tensor:
    """Return the encoder's input, shrunk to CIFAR's size, as an embedding, (B, D).

    At 224 px an image would have 150,528 channels.
    """
    height, width = height_and_width(encoder.config.image_size)
    return interpolate(encoder.prepare(images), (min(32, height), min(32, width)), mode="area").flatten(1)
