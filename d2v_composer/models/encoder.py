"""The frozen encoder that teacher and student share; it turns inputs into tokens. Its subclasses know the modality.

Shapes: B inputs, E extra tokens, N patches or frames, T = E + N tokens, D channels.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from d2v_composer.models.attention import Alibi, Block, attention_bias, autocast_dtype
from d2v_composer.models.sizes import Data2Vec2EncoderConfig, EncoderConfig


class Frozen(nn.Module):
    """A module that stays in eval mode and gets no gradient. Call :meth:`freeze` once the parameters exist.

    ``Trainer.fit`` and ``model_eval_mode`` call ``model.train(mode=True)`` on the whole model; here it has no effect.
    """

    def freeze(self) -> Self:
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def cast_weights(self, dtype: torch.dtype) -> Self:
        """Cast the weights of linear and convolution layers to autocast's dtype once, instead of in every step.

        LayerNorms, positions and extra tokens keep float32, in which autocast computes with them.
        """
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
                layer.to(dtype)
        return self


class Encoder(Frozen):
    """Inputs to tokens, then blocks. A subclass knows its modality, and all that follows needs not.

    Attributes:
        alibi: The bias of its blocks, if they have one.
        alibi_scale: Learned factors of that bias.
        half_residual: Keep the residual stream of these and of a teacher's blocks in autocast's dtype, not in float32.
        baseline: The name of :meth:`raw` in tables.
        input_name: What an exported program calls them.
    """

    alibi: Alibi | None
    alibi_scale: Tensor | None
    baseline: ClassVar[str]
    input_name: ClassVar[str]

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config: Any = config  # of the subclass's kind
        self.alibi = self.alibi_scale = None
        self.half_residual = False

    @property
    @abstractmethod
    def block_list(self) -> list[Any]:
        """The blocks, typed as the subclass's kind of block."""

    @abstractmethod
    def prepare(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Resize or normalize raw inputs.

        Raises:
            ValueError: The inputs have another shape or dtype.
        """

    def to_mix(self, inputs: Tensor) -> Tensor:
        """Return inputs in a form that :meth:`forward` takes and that Composer's algorithms may average: float."""
        return inputs

    @abstractmethod
    def embed_tokens(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the first block's input, (B, T, D), from inputs as in :meth:`forward`."""

    @abstractmethod
    def block_contexts(self, x_BTD: Tensor, padding_mask: Tensor | None = None) -> list[Tensor | None]:
        """Return each block's context, optionally followed by the contexts of a teacher's blocks."""

    @abstractmethod
    def num_tokens(self, shape: Sequence[int] | None = None) -> int:
        """Return T for an input of a shape; default the usual one."""

    @abstractmethod
    def stem_macs(self, shape: Sequence[int] | None = None) -> int:
        """Return the multiply-accumulates for one input before the blocks."""

    @abstractmethod
    def example(self, count: int) -> Tensor:
        """Return inputs of zeros, as after :meth:`prepare`."""

    @abstractmethod
    def noise(self, count: int) -> Tensor:
        """Return random inputs as before :meth:`prepare`, to measure with: uint8 images, or clips of five seconds."""

    @abstractmethod
    def raw(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return an embedding that takes no model, (B, features): the baseline of all others."""

    @property
    def free_axes(self) -> dict[int, tuple[str, int, int]]:
        """The dimensions of inputs that an exported program leaves free: name, smallest and largest size."""
        return {0: ("batch", 1, 1 << 16)}

    def padding_mask(self, lengths: Tensor | None, num_samples: int | None = None) -> Tensor | None:
        """Return which tokens are padding, (B, T) bool, of inputs with these lengths; ``None``: no token is.

        Args:
            lengths: (B,) int64; ``None``: nothing is padded.
            num_samples: Length of the padded inputs; default the longest of ``lengths``.

        Raises:
            ValueError: A length is too short; or the inputs have none.
        """
        if lengths is not None:
            raise ValueError(f"lengths: {self.config.modality} inputs have none")
        return None

    def keep_scale_whole(self) -> None:
        """Make ALiBi's scale a buffer: FSDP would gather it for this encoder alone, and a teacher's blocks read it."""
        if self.alibi_scale is not None:
            scale = self.alibi_scale.detach()
            del self.alibi_scale
            self.register_buffer("alibi_scale", scale)

    @torch.no_grad()
    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Encode inputs; those of several lengths are padded.

        Args:
            inputs: Images, (B, 3, S, S) float, already normalized; or uint8 of any size, resized (antialias) and
                normalized here. Or waveforms, (B, L) float, which are normalized here.
            lengths: Samples of each padded waveform, (B,) int64; ``None``: nothing is padded.

        Returns:
            (B, T, D), without gradient.

        Raises:
            ValueError: The inputs have another shape or dtype, or are too short.
        """
        return self.encode_with_gradient(inputs, lengths)

    def encode_with_gradient(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Encode inputs as :meth:`forward` does, with gradients for the parts that train."""
        x_BTD = self.embed_tokens(inputs, lengths)
        if self.half_residual:
            x_BTD = x_BTD.to(autocast_dtype(x_BTD))
        contexts = self.block_contexts(x_BTD, self.padding_mask(lengths, inputs.shape[-1]))
        for block, context in zip(self.block_list, contexts, strict=False):
            x_BTD, _ = block(x_BTD, context)
        return x_BTD

    def forward_macs(self, shape: Sequence[int] | None = None) -> int:
        """Return the multiply-accumulates for one input of a shape; default the usual one."""
        num_tokens = self.num_tokens(shape)
        return self.stem_macs(shape) + sum(block.forward_macs(num_tokens) for block in self.block_list)


class Data2Vec2Encoder(Encoder):
    """Extra tokens, LayerNorm and blocks with ALiBi, which data2vec 2.0's encoders have in common.

    A subclass adds its own layers, then calls :meth:`add_blocks`.
    """

    extra_tokens: nn.Parameter | None

    def add_blocks(self, config: Data2Vec2EncoderConfig) -> None:
        """Add what follows the subclass's layers. The order of all is that of the random numbers."""
        dim, hidden_dim = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
        self.extra_tokens = (
            nn.Parameter(torch.zeros(1, config.num_extra_tokens, dim)) if config.num_extra_tokens else None
        )
        blocks = [Block(dim, config.num_heads, hidden_dim, config.norm_eps) for _ in range(config.prenet_depth)]
        self.context_encoder = nn.ModuleDict(
            {"norm": nn.LayerNorm(dim, eps=config.norm_eps), "blocks": nn.ModuleList(blocks)}
        )
        self.alibi = build_alibi(self.config, config.num_heads, config.num_alibi_heads)
        self.alibi_scale = nn.Parameter(torch.ones(config.alibi_scale_shape)) if config.alibi_scale_shape else None

    @property
    def block_list(self) -> list[Any]:
        return list(cast("nn.ModuleList", self.context_encoder["blocks"]))

    def add_extra_tokens(self, x_BND: Tensor) -> Tensor:
        """Put the extra tokens in front, and apply the LayerNorm that comes before the blocks."""
        if self.extra_tokens is not None:
            x_BND = torch.cat([self.extra_tokens.expand(x_BND.shape[0], -1, -1), x_BND], dim=1)
        return self.context_encoder["norm"](x_BND)

    def block_contexts(
        self, x_BTD: Tensor, padding_mask: Tensor | None = None, layers: range | None = None
    ) -> list[Tensor | None]:
        """Return the attention biases of some layers, of which the teacher's follow this encoder's; default its own."""
        layers = range(len(self.block_list)) if layers is None else layers
        scales = [None] if self.alibi_scale is None else self.alibi_scale
        if len(scales) == 1:
            return [attention_bias(self.alibi, x_BTD, padding_mask, scales[0])] * len(layers) if layers else []
        return [attention_bias(self.alibi, x_BTD, padding_mask, scales[layer]) for layer in layers]


def build_alibi(config: EncoderConfig, num_heads: int, num_alibi_heads: int) -> Alibi | None:
    """Build ALiBi for blocks on this encoder's tokens; ``None`` for 0 ALiBi heads."""
    if not num_alibi_heads:
        return None
    extra = config.num_extra_tokens
    return Alibi(config.num_columns, num_heads=num_heads, num_alibi_heads=num_alibi_heads, num_extra_tokens=extra)
