"""Blocks on a shared encoder: the base of teachers and students.

Shapes: B inputs, T tokens, D channels, H heads.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from d2v_composer.models.attention import FfnBlock
from d2v_composer.models.encoder import Encoder
from d2v_composer.models.names import Pooling, Representation
from d2v_composer.models.sizes import EncoderConfig
from d2v_composer.models.targets import Normalization, mean_over_time, norm_mean


def poolings(
    x_BTD: Tensor, representation: Representation, config: EncoderConfig, padding_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """Return every pooling of a representation as ``{representation}_{pooling}`` → (B, D) float32."""
    x_BTD = x_BTD.float()
    pooled: dict[Pooling, Tensor] = {"cls": x_BTD[:, 0]} if config.has_cls_token else {}
    pooled["mean"] = mean_over_time(x_BTD, 0, padding_mask)[:, 0]
    pooled["mean_patches"] = mean_over_time(x_BTD, config.num_extra_tokens, padding_mask)[:, 0]
    return {f"{representation}_{pooling}": embedding_BD for pooling, embedding_BD in pooled.items()}


@contextmanager
def frozen_use() -> Iterator[None]:
    """Compute without gradients; this is safe even if a training step follows in the same autocast region.

    Autocast would keep the trained weights that it casts here, without gradient, and use them in that step.
    """
    caches_casts = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(caches_casts and not torch.is_grad_enabled())
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(caches_casts)


class Transformer(nn.Module, ABC):
    """Blocks that return their FFN outputs, on an encoder that turns a batch into (B, T, D).

    Args:
        encoder: Shared, not copied; frozen.
        blocks: The blocks after it.
        normalization: Normalization of each layer in ``layer_mean``; see
            :func:`~d2v_composer.models.targets.norm_mean`.
        final_layer_norm: End ``layer_mean`` with a LayerNorm, as norm_mean does.

    Attributes:
        embed_dim: Channels of the blocks and of embeddings; the encoder's, unless a student is narrower.
        norm_mean: :func:`~d2v_composer.models.targets.norm_mean`, or its compiled version.
    """

    def __init__(
        self,
        encoder: Encoder,
        blocks: Sequence[FfnBlock],
        normalization: Normalization = "instance",
        final_layer_norm: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.blocks = nn.ModuleList(blocks)
        self.embed_dim = encoder.config.embed_dim
        self.normalization: Normalization = normalization
        self.final_layer_norm = final_layer_norm
        self.norm_mean: Callable[..., Tensor] = norm_mean

    # Composer's FSDP: this module is not a unit; the encoder and the blocks are, because each is called separately.
    _fsdp_wrap = False

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """Return True if FSDP gathers a module's weights for each call and frees them after it."""
        return isinstance(module, Encoder | FfnBlock)

    @property
    def block_list(self) -> list[Any]:
        """:attr:`blocks`, typed as the subclass's kind of block."""
        return list(self.blocks)

    @property
    def num_extra_tokens(self) -> int:
        return self.encoder.config.num_extra_tokens

    @property
    def has_cls_token(self) -> bool:
        return self.encoder.config.has_cls_token

    @property
    def embedding_names(self) -> list[str]:
        """The names of all embeddings.

        Without a final LayerNorm, the mean over tokens of an instance-normalized layer is 0, which embeds nothing.
        """
        is_zero = self.normalization == "instance" and not self.final_layer_norm
        names = ["cls", "mean", "mean_patches"] if self.has_cls_token else ["mean", "mean_patches"]
        of_layers = [name for name in names if name == "cls" or not is_zero]
        return [*[f"output_{name}" for name in names], *[f"layer_mean_{name}" for name in of_layers]]

    @property
    def default_pooling(self) -> Pooling:
        """``cls``, or ``mean_patches`` of a model without that token."""
        return "cls" if self.has_cls_token else "mean_patches"

    @abstractmethod
    def block_contexts(self, x_BTD: Tensor, padding_mask: Tensor | None = None) -> list[Tensor | None]:
        """Return each block's context for an input: an attention bias, unless its kind needs another.

        It is (1, H, T, T), or (B, H, T, T) with ``padding_mask``, (B, T), of keys to leave out.
        """

    def padding_mask(self, lengths: Tensor | None, num_samples: int | None = None) -> Tensor | None:
        """Return which tokens are padding, (B, T) bool; see :meth:`~d2v_composer.models.encoder.Encoder.padding_mask`.

        Example:
            >>> teacher.padding_mask(None)  # nothing is padded
        """
        return self.encoder.padding_mask(lengths, num_samples)

    def encode(self, images: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Run the shared encoder: images or waveforms as for :meth:`embed` → (B, T, D), without gradient.

        Example:
            >>> x = teacher.encode(images)
            >>> x.shape  # 64 patches and CLS
            torch.Size([2, 65, 192])
        """
        return self.encoder(images, lengths)

    def iterate_blocks(
        self, x: Tensor, needs_last_output: bool = True, padding_mask: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the output and the FFN output of each block, (B, T, D) each, from :meth:`encode`'s (B, T, D)."""
        last = self.block_list[-1]
        for block, context in zip(self.block_list, self.block_contexts(x, padding_mask), strict=True):
            x, ffn_output_BTD = block(x, context, needs_last_output or block is not last)
            yield x, ffn_output_BTD

    def ffn_outputs(self, x: Tensor, padding_mask: Tensor | None = None) -> Iterator[Tensor]:
        """Yield the FFN output of each block, (B, T, D), without computing the last block's output."""
        return (ffn_output for _, ffn_output in self.iterate_blocks(x, False, padding_mask))

    def forward_blocks(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Return the last block's output and every FFN output, (B, T, D) each, from :meth:`encode`'s (B, T, D).

        ``padding_mask``, (B, T), is true for tokens that no other token may see.

        Example:
            >>> output, ffn_outputs = teacher.forward_blocks(teacher.encode(images))
            >>> output.shape, len(ffn_outputs)
            (torch.Size([2, 65, 192]), 6)
        """
        layers = list(self.iterate_blocks(x, padding_mask=padding_mask))
        return layers[-1][0], [ffn_output for _, ffn_output in layers]

    def represent(self, x: Tensor, representation: Representation, padding_mask: Tensor | None = None) -> Tensor:
        """Return a representation, (B, T, D), with gradient, from :meth:`encode`'s (B, T, D)."""
        if representation == "output":
            return self.forward_blocks(x, padding_mask)[0]
        return self.layer_mean(self.ffn_outputs(x, padding_mask), padding_mask=padding_mask)

    def layer_mean(
        self, layers: Iterable[Tensor], ignored_tokens: int = 0, padding_mask: Tensor | None = None
    ) -> Tensor:
        """Return :attr:`norm_mean` of layers as this model computes it, (B, T, D) float32."""
        return self.norm_mean(layers, ignored_tokens, self.normalization, self.final_layer_norm, padding_mask)

    def checkpoint_activations(self, enable: bool = True) -> None:
        """Turn recomputation of each block's activations in the backward pass, instead of keeping them, on or off."""
        for block in self.block_list:
            if isinstance(block.forward, partial):  # an earlier call's
                block.forward = block.forward.args[0]
            if enable:
                # Wraps forward, and so runs inside FSDP's hooks. Nothing in a block is random.
                block.forward = partial(  # pyright: ignore[reportAttributeAccessIssue]: checkpoint's type is too wide
                    checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
                )

    def embed_all(self, images: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """Compute every embedding in one forward pass, without gradient; for gradients, use :meth:`forward_blocks`.

        Args:
            images, lengths: As for :meth:`embed`.

        Returns:
            ``{representation}_{pooling}`` → (B, D) float32. Representations: ``output`` of the last block, and
            ``layer_mean``, norm_mean of the FFN outputs. Poolings: ``cls`` (if the model has that token), ``mean``
            and ``mean_patches``.

        Raises:
            ValueError: The images have another shape or dtype.

        Example:
            >>> embeddings = student.embed_all(images)
            >>> list(embeddings)[:3]
            ['output_cls', 'output_mean', 'output_mean_patches']
        """
        return self.embed_encoded(self.encode(images, lengths), self.padding_mask(lengths, images.shape[-1]))

    def embed_encoded(self, x: Tensor, padding_mask: Tensor | None = None) -> dict[str, Tensor]:
        """Compute every embedding from the encoder's output, (B, T, D); see :meth:`embed_all`."""
        with frozen_use():
            output, ffn_outputs = self.forward_blocks(x, padding_mask)
            options = self.encoder.config, padding_mask
            layer_mean = self.layer_mean(ffn_outputs, padding_mask=padding_mask)
            found = poolings(output, "output", *options) | poolings(layer_mean, "layer_mean", *options)
            return {name: found[name] for name in self.embedding_names}

    def embed(
        self,
        images: Tensor,
        pooling: Pooling | None = None,
        representation: Representation = "output",
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Return one embedding of each image or clip, (B, D) float32, without gradient.

        Args:
            images: (B, 3, height, width) uint8 of any size, which is resized and normalized here; or (B, 3, S, S)
                float of the model's size, already normalized: pixels from 0 to 1, minus ``encoder.config.image_mean``,
                over ``encoder.config.image_std``, by channel. For data2vec 2.0 these are ImageNet's, (0.485, 0.456,
                0.406) and (0.229, 0.224, 0.225), for a timm model its own. For an audio model waveforms: (B, L) float
                from -1 to 1, 16 kHz mono, normalized here.
            pooling: ``cls``, ``mean`` of all tokens, or ``mean_patches`` (of frames, too); default: ``cls``, or
                ``mean_patches`` of a model without that token, such as any of audio.
            representation: ``output`` of the last block, or ``layer_mean``, norm_mean of the FFN outputs, which the
                loss regresses.
            lengths: Samples of each waveform of a padded batch, (B,) int64.

        Raises:
            ValueError: The model has no such embedding, or the images have another shape or dtype.

        Example:
            >>> embeddings = student.embed(images, pooling="mean")
            >>> embeddings.shape
            torch.Size([2, 192])
        """
        embeddings = self.embed_all(images, lengths)
        name = f"{representation}_{pooling or self.default_pooling}"
        if name not in embeddings:
            raise ValueError(f"no embedding {name!r}; this model has: {', '.join(embeddings)}")
        return embeddings[name]

    def forward_macs(self, shape: Sequence[int] | None = None) -> int:
        """Return the multiply-accumulates for one input in the blocks, without the encoder; default the usual one."""
        num_tokens = self.encoder.num_tokens(shape)
        return sum(block.forward_macs(num_tokens) for block in self.block_list)
