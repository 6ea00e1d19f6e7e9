"""Baselines that a student is compared with besides its teacher: the frozen encoder alone, and raw pixels.

Shapes: B images, D channels.
"""

from torch import Tensor
from torch.nn.functional import interpolate

from d2v_composer.models.image_encoder import ImageEncoder
from d2v_composer.models.transformer import poolings

__all__ = ["embed_with_encoder", "pixels"]


def pixels(encoder: ImageEncoder, images: Tensor) -> Tensor:
    """Return the encoder's input, shrunk to CIFAR's size, as an embedding, (B, D).

    At 224 px an image would have 150,528 channels.
    """
    return interpolate(encoder.prepare(images), min(32, encoder.config.image_size), mode="area").flatten(1)


def embed_with_encoder(encoder: ImageEncoder, images: Tensor) -> dict[str, Tensor]:
    """Return the encoder's output in every pooling, (B, D) each."""
    return poolings(encoder(images), "output", encoder.config.num_extra_tokens)
