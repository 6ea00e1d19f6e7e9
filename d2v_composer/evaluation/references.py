"""What a student is compared with besides its teacher: the frozen encoder alone, and raw pixels.

Shapes: B images, D channels.
"""

from torch import Tensor
from torch.nn.functional import interpolate

from d2v_composer.models.image_encoder import ImageEncoder
from d2v_composer.models.transformer import poolings

__all__ = ["embed_with_encoder", "pixels"]


def pixels(encoder: ImageEncoder, images: Tensor) -> Tensor:
    """Images as the encoder would get them, shrunk to CIFAR's size: (B, D).

    The pixels of 224 px would be 150,528 channels an image.
    """
    return interpolate(encoder.prepare(images), min(32, encoder.config.image_size), mode="area").flatten(1)


def embed_with_encoder(encoder: ImageEncoder, images: Tensor) -> dict[str, Tensor]:
    """The encoder's output in every pooling, (B, D) each."""
    return poolings(encoder(images), "output", encoder.config.num_extra_tokens)
