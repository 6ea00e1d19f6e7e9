"""Base of encoders, which turn inputs into tokens.

Shapes: B inputs, E extra tokens, N patches or frames, T = E + N tokens, D channels, P channels of ``pooled``.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import Self

from d2v_composer.models.attention import Alibi, Block, attention_bias
from d2v_composer.models.configs import Config, EncoderConfig


def count_flop(model: nn.Module, compute: Callable[[], object]) -> dict[object, int]:
    """Count the operations of matrix products and convolutions in ``compute``, 2 per multiply-accumulate.

    Args:
        model: The model, which is in eval mode while ``compute`` runs.
        compute: Runs the model.

    Returns:
        Operator of torch → number of operations.
    """
    was_training = model.training
    with (
        torch.random.fork_rng(devices=[]),  # a run's random numbers stay the same
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),  # fused attention is not counted
    ):
        model.eval()
        compute()
    model.train(was_training)
    return counter.get_flop_counts().get("Global", {})


class Inputs(NamedTuple):
    """A batch for an encoder."""

    values: Tensor
    """Images, (B, 3, height, width), normalized float or uint8; or waveforms of L samples, (B, L) float."""
    lengths: Tensor | None = None
    """Number of samples of each waveform in a padded batch, (B,) int64; ``None``: nothing is padded."""
    window_weights: Tensor | None = None
    """If ``values`` are W windows of each clip, (B·W, L): the weight of each window in the clip's embedding, (B, W)."""

    def filled_up(self, missing: int) -> "Inputs":
        """Append ``missing`` inputs of zeros to the batch; if it has ``lengths``, pad clips to one of a few lengths."""
        # A compiled model needs a graph for each length; there are eight lengths from a power of two to the next.
        values, lengths, _ = self
        size, more = values.shape[-1], 0
        if lengths is not None:
            lengths, more = pad(lengths, (0, missing), value=size), -size % (1 << max(size.bit_length() - 4, 0))
        amounts = (0, more) + (0, 0) * (values.ndim - 2) + (0, missing)
        return Inputs(pad(values, amounts) if any(amounts) else values, lengths)  # pad would copy them


class Tokens(NamedTuple):
    """An encoder's output for a batch."""

    x: Tensor
    """Tokens, (B, T, D)."""
    padding_mask: Tensor | None = None
    """Mask of the tokens, (B, T) bool, true for padding; ``None``: no token is padding."""
    window_weights: Tensor | None = None
    """See :class:`Inputs`."""
    pooled: Tensor | None = None
    """The pooled feature, (B, P), of a model that pools its features itself."""


class Freezable(nn.Module):
    """A module that stays in eval mode and gets no gradient once :meth:`freeze` has been called."""

    is_frozen = False

    def freeze(self) -> Self:
        for part in self.modules():
            if isinstance(part, Freezable):
                part.is_frozen = True
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.is_frozen)

    def cast_weights(self, dtype: torch.dtype) -> Self:
        """Cast the weights of linear and convolution layers, and modules whose ``is_cast`` is true, to ``dtype``."""
        for layer in self.modules():
            if getattr(layer, "is_cast", isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)):
                layer.to(dtype)
        return self


class Encoder(Freezable):
    """Base of encoders, which turn inputs into tokens. Models may share an encoder.

    Attributes:
        alibi: The module that computes ALiBi's bias for the encoder's blocks; ``None`` without ALiBi.
        baseline: Name of the embedding that :meth:`baseline_of` returns.
        input_name: Name of the inputs in an exported program.
    """

    alibi: Alibi | None
    baseline: ClassVar[str]
    input_name: ClassVar[str]

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config: Any = config  # a subclass has its own class of configs
        self.alibi = None

    @property
    def embed_dim(self) -> int:
        return self.config.embed_dim

    @property
    def block_list(self) -> list[Any]:
        """The encoder's blocks."""
        return []

    @abstractmethod
    def prepare(self, values: Tensor) -> Tensor:
        """Check inputs, then resize and normalize them as the encoder requires."""

    def normalized(self, values: Tensor) -> Tensor:
        """Return inputs as floats that :meth:`forward` takes."""
        return values

    @abstractmethod
    def embed_tokens(self, inputs: Inputs) -> Tensor:
        """Return the tokens that enter the encoder's blocks, (B, T, D)."""

    def block_contexts(self, x_BTD: Tensor, padding_mask: Tensor | None = None) -> list[Tensor | None]:
        """Return the attention bias, the rotary positions or ``None`` for each of the encoder's blocks."""
        return []

    @abstractmethod
    def num_tokens(self, shape: Sequence[int] | None = None) -> int:
        """Return the number of tokens for an input of this shape; default: an image, or a second of audio."""

    @abstractmethod
    def example(self, count: int) -> Tensor:
        """Return ``count`` float inputs of zeros."""

    @abstractmethod
    def noise(self, count: int) -> Tensor:
        """Return ``count`` random inputs for :meth:`prepare`: uint8 images, or clips of five seconds."""

    def fixed_inputs(self, count: int) -> Tensor:
        """Return ``count`` inputs for :meth:`prepare` that are the same on every machine."""
        zeros = self.example(count)
        pattern = torch.arange(zeros.numel()).mul(7919).remainder(251).view(zeros.shape)
        return pattern.to(torch.uint8) if self.config.modality == "image" else pattern / 125 - 1

    @abstractmethod
    def baseline_of(self, inputs: Inputs) -> Tensor:
        """Return a baseline embedding, (B, channels), computed without a model."""

    @property
    def free_axes(self) -> dict[int, tuple[str, int, int]]:
        """Dynamic dimensions of an exported program's inputs: index → (name, smallest size, largest size)."""
        return {0: ("batch", 1, 1 << 16)}

    def windows(self, inputs: Inputs) -> Inputs:
        """Divide inputs that are too long for the encoder into windows; by default, return the inputs unchanged."""
        return inputs

    def padding_mask(self, lengths: Tensor | None, num_samples: int | None = None) -> Tensor | None:
        """Return which tokens are padding, (B, T) bool, for inputs of these lengths; ``None``: no token is padding.

        Args:
            lengths: Number of samples of each input, (B,) int64; ``None``: nothing is padded.
            num_samples: Number of samples in each padded input; default: the largest of ``lengths``.
        """
        if lengths is not None:
            raise ValueError(f"lengths: expected None for {self.config.modality} inputs")
        return None

    def forward(self, inputs: Inputs) -> Tokens:
        """Return the tokens of inputs, with their padding mask."""
        padding_mask = self.padding_mask(inputs.lengths, inputs.values.shape[-1])
        x_BTD = self.embed_tokens(inputs)
        for block, context in zip(self.block_list, self.block_contexts(x_BTD, padding_mask), strict=True):
            x_BTD, _ = block(x_BTD, context)
        return Tokens(x_BTD, padding_mask, inputs.window_weights)

    def flop(self) -> int:
        """Return the number of operations for one input of :meth:`noise`; see :func:`count_flop`."""
        return sum(count_flop(self, lambda: self(Inputs(self.noise(1)))).values())


class Data2Vec2Encoder(Encoder):
    """Base of the encoders of data2vec 2.0 and EAT.

    A subclass adds its layers, then calls :meth:`add_blocks`.

    Attributes:
        alibi_scale: Learned factors of ALiBi's bias, or ``None``; for their shape, see
            :attr:`~d2v_composer.models.configs.Data2Vec2EncoderConfig.alibi_scale_shape`.
    """

    extra_tokens: nn.Parameter | None
    alibi_scale: Tensor | None

    def add_blocks(self) -> None:
        """Add the extra tokens, the LayerNorm, the blocks and ALiBi."""
        config = self.config
        dim, hidden_dim = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
        self.extra_tokens = (
            nn.Parameter(torch.zeros(1, config.num_extra_tokens, dim)) if config.num_extra_tokens else None
        )
        blocks = [Block(dim, config.num_heads, hidden_dim, config.norm_eps) for _ in range(config.prenet_depth)]
        self.context_encoder = nn.ModuleDict(
            {"norm": nn.LayerNorm(dim, eps=config.norm_eps), "blocks": nn.ModuleList(blocks)}
        )
        self.alibi = build_alibi(config, config.num_heads, config.num_alibi_heads)
        self.alibi_scale = nn.Parameter(torch.ones(config.alibi_scale_shape)) if config.alibi_scale_shape else None

    @property
    def block_list(self) -> list[Any]:
        return list(cast("nn.ModuleList", self.context_encoder["blocks"]))

    def add_extra_tokens(self, x_BND: Tensor) -> Tensor:
        """Prepend the extra tokens to ``x_BND``, then apply the LayerNorm: (B, T, D)."""
        if self.extra_tokens is not None:
            x_BND = torch.cat([self.extra_tokens.expand(x_BND.shape[0], -1, -1), x_BND], dim=1)
        return self.context_encoder["norm"](x_BND)

    def block_contexts(
        self, x_BTD: Tensor, padding_mask: Tensor | None = None, layers: range | None = None
    ) -> list[Tensor | None]:
        """Return the attention bias, or ``None``, of each block in ``layers``; default: the encoder's blocks.

        Index 0 in ``layers`` is the encoder's first block; the teacher's blocks follow the encoder's blocks.
        """
        layers = range(len(self.block_list)) if layers is None else layers
        scales = [None] if self.alibi_scale is None else self.alibi_scale
        if len(scales) == 1:
            return [attention_bias(self.alibi, x_BTD, padding_mask, scales[0])] * len(layers) if layers else []
        return [attention_bias(self.alibi, x_BTD, padding_mask, scales[layer]) for layer in layers]


def build_alibi(config: EncoderConfig, num_heads: int, num_alibi_heads: int) -> Alibi | None:
    """Build ALiBi for blocks on an encoder's tokens; ``None`` for 0 ALiBi heads."""
    if not num_alibi_heads:
        return None
    extra = config.num_extra_tokens
    return Alibi(config.num_columns, num_heads=num_heads, num_alibi_heads=num_alibi_heads, num_extra_tokens=extra)
