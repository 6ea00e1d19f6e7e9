"""A stack of blocks on a modality encoder: what teachers and students have in common.

Shapes: B images, T time steps, D channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal, cast

import torch
from torch import Tensor, nn

from d2v_composer.models.alibi import compute_dtype
from d2v_composer.models.block import Block
from d2v_composer.models.image_encoder import ImageEncoder
from d2v_composer.targets import norm_mean

__all__ = ["Pooling", "Representation", "Transformer", "poolings"]

Pooling = Literal["cls", "mean", "mean_patches"]
Representation = Literal["output", "layer_mean"]


def poolings(x_BTD: Tensor, representation: Representation, num_extra_tokens: int) -> dict[str, Tensor]:
    """Every pooling of one representation, (B, D) float32 each, under the names ``{representation}_{pooling}``."""
    x = x_BTD.float()
    pooled: dict[Pooling, Tensor] = {"mean": x.mean(dim=1), "mean_patches": x[:, num_extra_tokens:].mean(dim=1)}
    if num_extra_tokens:
        pooled = {"cls": x[:, 0], **pooled}
    return {f"{representation}_{pooling}": embedding for pooling, embedding in pooled.items()}


class Transformer(nn.Module, ABC):
    """Blocks that return their FFN outputs, on an encoder that turns a batch into (B, T, D).

    Args:
        encoder: Shared, not copied; frozen.
        blocks: The blocks after it.
    """

    def __init__(self, encoder: ImageEncoder, blocks: list[Block]) -> None:
        super().__init__()
        self.encoder = encoder
        self.blocks = nn.ModuleList(blocks)

    @property
    def block_list(self) -> list[Block]:
        """:attr:`blocks` with their type, which a ModuleList forgets."""
        return cast("list[Block]", list(self.blocks))

    @property
    def num_extra_tokens(self) -> int:
        return self.encoder.config.num_extra_tokens

    @abstractmethod
    def block_biases(self, dtype: torch.dtype) -> list[Tensor | None]:
        """The attention bias of each block in ``dtype``, (1, H, T, T); ``None`` where there is none."""

    def encode(self, images: Tensor) -> Tensor:
        """The shared encoder: images as :meth:`embed_all` takes them to (B, T, D), without gradient."""
        return self.encoder(images)

    def iterate_blocks(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each block's ``(attended, ffn_output)``, (B, T, D) both.

        The last block's residual and norm are left out: who wants FFN outputs alone does not pay for them.
        """
        for block, bias in zip(self.block_list, self.block_biases(compute_dtype(x)), strict=True):
            attended, ffn_output = block(x, bias)
            yield attended, ffn_output
            if block is not self.block_list[-1]:
                x = block.output(attended, ffn_output)

    def ffn_outputs(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the FFN output of each block, (B, T, D)."""
        return (ffn_output for _, ffn_output in self.iterate_blocks(x))

    def forward_blocks(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """All blocks: the last one's output and every FFN output, (B, T, D) each."""
        layers = list(self.iterate_blocks(x))
        return self.block_list[-1].output(*layers[-1]), [ffn_output for _, ffn_output in layers]

    def embed_all(self, images: Tensor) -> dict[str, Tensor]:
        """Every representation in every pooling from one forward pass.

        Args:
            images: (B, 3, S, S) float, already normalised; or uint8 of any size, resized and normalised here.

        Returns:
            ``{representation}_{pooling}`` → (B, D) float32, for the representations ``output`` (of the last block)
            and ``layer_mean`` (norm_mean of the FFN outputs) and the poolings ``cls`` (where the model has extra
            tokens), ``mean`` and ``mean_patches``.
        """
        output, ffn_outputs = self.forward_blocks(self.encode(images))
        return poolings(output, "output", self.num_extra_tokens) | poolings(
            norm_mean(ffn_outputs), "layer_mean", self.num_extra_tokens
        )

    def embed(self, images: Tensor, pooling: Pooling = "cls", representation: Representation = "output") -> Tensor:
        """One vector an image, (B, D) float32; see :meth:`embed_all` for the names."""
        embeddings = self.embed_all(images)
        name = f"{representation}_{pooling}"
        if name not in embeddings:
            raise ValueError(f"no embedding {name!r}; this model has: {', '.join(embeddings)}")
        return embeddings[name]

    def forward_macs(self) -> int:
        """Multiply-accumulates of one image in the blocks after the encoder."""
        return sum(block.forward_macs(self.encoder.config.num_steps) for block in self.block_list)
