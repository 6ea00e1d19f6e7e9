"""A backbone of blocks with residual streams: the base of our teachers and students.

Shapes: B inputs, T tokens, D channels, H heads.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from d2v_composer.models.attention import FfnBlock
from d2v_composer.models.backbone import Backbone
from d2v_composer.models.encoder import Encoder, Tokens
from d2v_composer.models.features import Features


class Transformer(Backbone):
    """Blocks that return their FFN outputs, on an encoder.

    Args:
        encoder, config, provenance: As for :class:`~d2v_composer.models.backbone.Backbone`.
        blocks: The blocks after the encoder.

    Attributes:
        norm: Follows the last block; an Identity unless the model has a final norm.
    """

    norm: nn.Module

    def __init__(
        self, encoder: Encoder, blocks: Sequence[FfnBlock], config: Any, provenance: dict[str, Any] | None = None
    ) -> None:
        super().__init__(encoder, config, provenance)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.Identity()

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def block_list(self) -> list[Any]:
        """The blocks after the encoder."""
        return list(self.blocks)

    @abstractmethod
    def block_contexts(self, x_BTD: Tensor, padding_mask: Tensor | None = None) -> list[Tensor | None]:
        """Return each block's context for an input: an attention bias or, for instance, rotary positions.

        It is (1, H, T, T), or (B, H, T, T) with ``padding_mask``, (B, T), of keys to leave out.
        """

    def iterate_blocks(
        self, x: Tensor, needs_last_output: bool = True, padding_mask: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the output and the FFN output of each block, (B, T, D) each, from :meth:`encode`'s (B, T, D)."""
        last = self.block_list[-1]
        for block, context in zip(self.block_list, self.block_contexts(x, padding_mask), strict=True):
            x, ffn_output_BTD = block(x, context, needs_last_output or block is not last)
            yield x, ffn_output_BTD

    def features(self, tokens: Tokens) -> Features:
        x, padding_mask, shares, _ = tokens
        return Features(
            lambda needs_last_output: self.iterate_blocks(x, needs_last_output, padding_mask),
            self.num_layers,
            self.norm,
            self.num_extra_tokens,
            self.has_cls_token,
            padding_mask,
            shares,
            project=self.project if self.projected_width else None,
        )

    def forward_blocks(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Return the model's output and every FFN output, (B, T, D) each, from :meth:`encode`'s (B, T, D).

        ``padding_mask``, (B, T), is true for tokens that no other token may see.

        Example:
            >>> output, ffn_outputs = teacher.forward_blocks(teacher.encode(images))
            >>> output.shape, len(ffn_outputs)
            (torch.Size([2, 65, 192]), 6)
        """
        return self.features(Tokens(x, padding_mask)).with_output(list)

    def checkpoint_activations(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass (``enable``), or keep them in memory."""
        from torch.utils.checkpoint import checkpoint  # takes a quarter of a second

        for block in self.block_list:
            if isinstance(block.forward, partial):  # an earlier call's
                block.forward = block.forward.args[0]
            if enable:
                # Nothing in a block is random.
                block.forward = partial(  # pyright: ignore[reportAttributeAccessIssue]: checkpoint's type is too wide
                    checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
                )

    def forward_macs(self, shape: Sequence[int] | None = None) -> int:
        num_tokens = self.encoder.num_tokens(shape)
        parts = [*self.block_list, *([] if self.projection is None else [self.projection])]
        return sum(part.forward_macs(num_tokens) for part in parts)
