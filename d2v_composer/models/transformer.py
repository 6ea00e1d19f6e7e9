"""A stack of blocks on a modality encoder: what teachers and students have in common.

Shapes: B images, T time steps, D channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from d2v_composer.models.alibi import compute_dtype, mask_padding
from d2v_composer.models.block import Block
from d2v_composer.models.image_encoder import ImageEncoder
from d2v_composer.models.targets import norm_mean

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


def masked_biases(biases: list[Tensor | None], padding_mask: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
    """Each block's bias with padding masked; what blocks share is made once."""
    masked = {id(bias): mask_padding(bias, padding_mask, dtype) for bias in biases}
    return [masked[id(bias)] for bias in biases]


class Transformer(nn.Module, ABC):
    """Blocks that return their FFN outputs, on an encoder that turns a batch into (B, T, D).

    Args:
        encoder: Shared, not copied; frozen.
        blocks: The blocks after it.

    Attributes:
        norm_mean: :func:`~d2v_composer.models.targets.norm_mean`, or what computes the same.
    """

    def __init__(self, encoder: ImageEncoder, blocks: list[Block]) -> None:
        super().__init__()
        self.encoder = encoder
        self.blocks = nn.ModuleList(blocks)
        self.norm_mean = norm_mean

    # Composer's FSDP: no unit of its own, but each part that is called by itself, in whatever order.
    _fsdp_wrap = False

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """Whether FSDP gathers a module's weights when it is called, and lets them go after."""
        return isinstance(module, ImageEncoder | Block)

    @property
    def block_list(self) -> list[Block]:
        """:attr:`blocks` with their type, which a ModuleList forgets."""
        return cast("list[Block]", list(self.blocks))

    @property
    def num_extra_tokens(self) -> int:
        return self.encoder.config.num_extra_tokens

    @abstractmethod
    def block_biases(self, x: Tensor) -> list[Tensor | None]:
        """What is added to each block's attention scores for an input ``x``, (B, T, D): (1, H, T, T), or ``None``."""

    def encode(self, images: Tensor) -> Tensor:
        """The shared encoder: images as :meth:`embed_all` takes them to (B, T, D), without gradient."""
        return self.encoder(images)

    def ffn_outputs(self, x: Tensor, padding_mask: Tensor | None = None) -> Iterator[Tensor]:
        """Yield the FFN output of each block, (B, T, D); what the last block makes of its own is not computed.

        Args:
            x: (B, T, D), from :meth:`encode`.
            padding_mask: (B, T) bool, true for time steps that are padding and are not attended to; default none.
        """
        return (ffn_output for _, ffn_output in self._iterate_blocks(x, padding_mask, needs_last_output=False))

    def forward_blocks(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """All blocks: the last one's output and every FFN output, (B, T, D) each; see :meth:`ffn_outputs`."""
        layers = list(self._iterate_blocks(x, padding_mask, needs_last_output=True))
        return layers[-1][0], [ffn_output for _, ffn_output in layers]

    def _iterate_blocks(
        self, x: Tensor, padding_mask: Tensor | None, needs_last_output: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        biases = self.block_biases(x)
        if padding_mask is not None:
            biases = masked_biases(biases, padding_mask, compute_dtype(x))
        last = self.block_list[-1]
        for block, bias in zip(self.block_list, biases, strict=True):
            x, ffn_output = block(x, bias, needs_last_output or block is not last)
            yield x, ffn_output

    def checkpoint_activations(self) -> None:
        """Make training keep each block's input alone, and compute the rest once more in the backward pass."""
        for block in self.block_list:
            # Within forward, and so within FSDP's hooks. Nothing in a block is random.
            block.forward = partial(  # pyright: ignore[reportAttributeAccessIssue]: checkpoint's type says too little
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )

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
            self.norm_mean(ffn_outputs), "layer_mean", self.num_extra_tokens
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
