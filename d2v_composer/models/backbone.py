"""Models that turn inputs into features, and features into embeddings: the base of teachers and students.

A model's raw embeddings are its pooled features, such as ``output_mean``, and a timm teacher's ``joint``.
Shapes: B inputs, T tokens, D channels, H heads, P channels of the embedding.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from d2v_composer.models.alignment import Alignment, EmbeddingInfo, hash_tensors
from d2v_composer.models.attention import FfnBlock
from d2v_composer.models.encoder import Encoder, Freezable, Inputs, Tokens, count_flop
from d2v_composer.models.features import Features
from d2v_composer.models.names import EMBEDDING, JOINT, MadeBy, Pooling, Representation
from d2v_composer.models.provenance import Record, has_tuned_encoder
from d2v_composer.models.targets import LayerMean, embeddings_of, names_of
from d2v_composer.system.errors import InputError

# What is kept of a model's outputs for fixed inputs: how many numbers of each kind, and the prime that spreads them.
NUM_FIXED_INPUTS, NUM_OUTPUTS, OUTPUT_STEP = 2, 8, 1_000_003


@contextmanager
def frozen_use() -> Iterator[None]:
    """Compute without gradients in the ``with`` block."""
    # Autocast would keep the weights that it casts here, without gradient, for a training step that follows.
    caches_casts = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(caches_casts and not torch.is_grad_enabled())
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(caches_casts)


def freeze_unused_parameters(model: nn.Module, result: Tensor) -> None:
    """Freeze those parameters of a model that do not influence ``result``."""
    if result.requires_grad:
        result.sum().backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def hash_weights(model: "Backbone", left_out: tuple[str, ...] = ()) -> str:
    """Return a hash of a model's sizes and weights, without tensors whose names begin with a prefix in ``left_out``."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(left_out)}
    return hash_tensors(tensors, (model.encoder.config, model.config))


def frozen_prefixes(module: nn.Module, prefix: str = "") -> tuple[str, ...]:
    """Return the prefixes of the names of tensors in a module's frozen parts."""
    parts = module.named_modules(prefix=prefix, remove_duplicate=False)
    return tuple(f"{name}." for name, part in parts if isinstance(part, Freezable) and part.is_frozen)


def keep_trained_tensors(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """Remove the tensors of frozen parts from a state dict."""
    frozen = frozen_prefixes(module, prefix.removesuffix("."))
    for name in [name for name in state_dict if name.startswith(frozen)]:
        del state_dict[name]


def check_tensors(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Check that a state dict has exactly the tensors of the module's state dict."""
    stored, expected = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith(prefix)}
        for tensors in (state_dict, module.state_dict(prefix=prefix))
    )
    if different := sorted(stored.items() ^ expected.items()):
        name, _ = different[0]
        found = [f"has the shape {sizes[name]}" if name in sizes else "is missing" for sizes in (stored, expected)]
        raise InputError(f"the tensor {name!r} {found[0]} in the checkpoint, and {found[1]} in the model")


def expect_no_frozen_tensors(module: nn.Module, incompatible_keys: _IncompatibleKeys) -> None:
    """Let strict loading accept missing tensors; :func:`check_tensors` has checked which tensors are missing."""
    incompatible_keys.missing_keys.clear()


class Backbone(nn.Module, ABC):
    """Base of models: an encoder, and layers that turn its tokens into features.

    Args:
        encoder: The encoder, which models may share.
        config: The model's sizes, and the settings of ``layer_mean``.
        provenance: Origin of the weights.

    Attributes:
        embed_dim: Number of channels of the features, D.
        layer_mean: The module that computes this model's ``layer_mean`` representation.
        head: The classifier of a fine-tuned student, or ``None``.
        blocks: The blocks after the encoder, if there are any.
        raw_embedding: Name of the raw embedding that :meth:`embed` returns by default if there is no alignment.
        alignment: The :class:`~d2v_composer.models.alignment.Alignment` that computes the embedding, or ``None``.
    """

    def __init__(self, encoder: Encoder, config: Any, provenance: Record | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.config: Any = config  # a subclass has its own class of configs
        self.blocks = nn.ModuleList()
        self.provenance: Record = provenance or {}
        self.embed_dim = encoder.embed_dim
        self.layer_mean = LayerMean(config.normalization, config.final_layer_norm)
        self.head: nn.Module | None = None
        self.alignment: Alignment | None = None
        self.raw_embedding = f"output_{self.default_pooling}"

    @abstractmethod
    def features(self, tokens: Tokens) -> Features:
        """Return the model's features, given the encoder's tokens."""

    def flop(self) -> int:
        """Return the number of operations for all embeddings of one input; see :meth:`Encoder.flop`."""
        return sum(count_flop(self, lambda: self.embed_all(self.encoder.noise(1))).values())

    @property
    def block_list(self) -> list[Any]:
        """The blocks after the encoder."""
        return list(self.blocks)

    def checkpoint_activations(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass if ``enable``, else keep activations in memory.

        The base class does nothing.
        """

    @property
    def num_extra_tokens(self) -> int:
        return self.encoder.config.num_extra_tokens

    @property
    def has_cls_token(self) -> bool:
        return self.encoder.config.has_cls_token

    @property
    def raw_names(self) -> list[str]:
        """The names of all raw embeddings."""
        return names_of(self.layer_mean, self.has_cls_token)

    @property
    def embedding(self) -> EmbeddingInfo:
        """The description of the model's embedding."""
        return self.describe(EMBEDDING)

    made_by: MadeBy = "raw"
    """The ``made_by`` of :attr:`embedding` if there is no alignment."""

    def identify_weights(self) -> str:
        """Return a hash of a teacher's weights and preprocessing, or of a student's sizes and trained weights."""
        # A run may hold frozen parts in another dtype than a file. A trained encoder is frozen once it is loaded.
        trained = ("encoder.",) if has_tuned_encoder(self.provenance) else ()
        left_out = tuple(prefix for prefix in frozen_prefixes(self) if not prefix.startswith(trained))
        return self.provenance.get("sha256") or hash_weights(self, left_out)

    def describe(self, name: str) -> EmbeddingInfo:
        """Return the description of an embedding, by name."""
        if name == EMBEDDING and self.alignment is not None:
            return self.alignment.info
        name = self.raw_embedding if name == EMBEDDING else name
        space = f"{self.identify_weights()} {name}"
        if name.startswith("layer_mean"):
            space += f" {len(self.block_list)} {self.layer_mean.normalization} {self.layer_mean.final_layer_norm}"
        return EmbeddingInfo(name, self.made_by, self.width_of(name), "", space)

    def width_of(self, name: str) -> int:
        """Return the number of channels of a raw embedding."""
        return self.embed_dim

    def choose_embedding(self, pooling: Pooling | None = None, representation: Representation | None = None) -> str:
        """Return the name of the raw embedding with this pooling and representation.

        With neither argument, return ``EMBEDDING``.

        Raises:
            InputError: The model has no embedding with this pooling and representation.
        """
        if pooling is None and representation is None:
            return EMBEDDING
        name = f"{representation or 'output'}_{pooling or self.default_pooling}"
        if name not in self.raw_names:
            raise InputError(
                f"representation and pooling: this model has no {name}; it has {', '.join(self.raw_names)}"
            )
        return name

    def use_embedding(self, pooling: Pooling | None, representation: Representation | None) -> None:
        """Set :attr:`raw_embedding` by pooling and representation; with neither argument, change nothing.

        Raises:
            InputError: The model has no embedding with this pooling and representation.
        """
        if (name := self.choose_embedding(pooling, representation)) != EMBEDDING:
            self.raw_embedding = name

    @property
    def alignment_inputs(self) -> list[str]:
        """The names of the raw embeddings that an alignment reads."""
        return [name for name in self.raw_names if name.endswith(("_cls", "_mean"))]

    def align(self, weight: Tensor, bias: Tensor, of: str, made_by: MadeBy = "alignment", space: str = "") -> None:
        """Set the alignment of this model; for the arguments, see :class:`Alignment`."""
        device = next(self.parameters()).device
        self.alignment = Alignment(self.alignment_inputs, weight.to(device), bias.to(device), of, made_by, space)

    def train_alignment(self, teachers: EmbeddingInfo) -> None:
        """Set an alignment with random weights; training makes it estimate the teacher's embedding, ``teachers``."""
        width = sum(map(self.width_of, self.alignment_inputs))
        weight = nn.init.normal_(torch.empty(teachers.width, width), std=0.02)
        self.align(weight, torch.zeros(teachers.width), teachers.of, "training", teachers.space)

    @property
    def default_pooling(self) -> Pooling:
        """``cls``, or ``mean`` for a model without a CLS token."""
        return "cls" if self.has_cls_token else "mean"

    def padding_mask(self, lengths: Tensor | None, num_samples: int | None = None) -> Tensor | None:
        """Return which tokens are padding, (B, T) bool; see :meth:`~d2v_composer.models.encoder.Encoder.padding_mask`.

        Example:
            >>> teacher.padding_mask(None)  # nothing is padded
        """
        return self.encoder.padding_mask(lengths, num_samples)

    def encode(self, images: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the encoder's tokens for images or waveforms, (B, T, D), without gradient.

        Example:
            >>> x = teacher.encode(images)
            >>> x.shape  # 64 patches and CLS
            torch.Size([2, 65, 192])
        """
        with frozen_use():
            return self.encoder(Inputs(images, lengths)).x

    def forward_blocks(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Return the model's output and each block's FFN output, (B, T, D) each, given the result of :meth:`encode`.

        ``padding_mask``, (B, T), is true for padding.

        Example:
            >>> output, ffn_outputs = teacher.forward_blocks(teacher.encode(images))
            >>> output.shape, len(ffn_outputs)
            (torch.Size([2, 65, 192]), 6)
        """
        return self.features(Tokens(x, padding_mask)).with_output(list)

    def represent(self, features: Features, representation: Representation) -> Tensor:
        """Return a representation, (B, T, D), with gradient."""
        if representation == "layer_mean":
            return self.layer_mean(features.layers(), features)
        return features.output

    def read(self, features: Features, name: str = EMBEDDING) -> Tensor:
        """Return the embedding ``name`` of features, (B, P) float32, with gradient."""
        if name == EMBEDDING and self.alignment is not None:
            return self.alignment(embeddings_of(features, self.layer_mean))
        name = self.raw_embedding if name == EMBEDDING else name
        if name == JOINT:
            assert features.joint is not None
            return features.joint(features.output).float()
        representation: Representation = "layer_mean" if name.startswith("layer_mean") else "output"
        return features.poolings(self.represent(features, representation), f"{representation}_")[name]

    def embed_all(
        self, images: Tensor, lengths: Tensor | None = None, *, layer_mean: LayerMean | None = None
    ) -> dict[str, Tensor]:
        """Compute every embedding in one forward pass, without gradient.

        Args:
            images, lengths: See :meth:`embed`.
            layer_mean: The module that computes ``layer_mean``; default: this model's.

        Returns:
            Name → embedding, (B, channels) float32: ``embedding``, which :meth:`embed` returns by default, and the raw
            embeddings.

        Raises:
            ValueError: The images or waveforms have a shape or dtype that :meth:`embed` does not take.

        Example:
            >>> embeddings = student.embed_all(images)
            >>> list(embeddings)[:3]
            ['output_cls', 'output_mean', 'output_mean_patches']
        """
        with frozen_use():
            return self.embed_encoded(self.encoder(self.encoder.windows(Inputs(images, lengths))), layer_mean)

    def sample_outputs(self) -> tuple[float, ...]:
        """Return a few numbers from the model's outputs for fixed inputs on a CPU; () if the output is not finite."""
        with frozen_use(), torch.autocast("cpu", enabled=False):
            encoder = self.encoder
            features = self.features(encoder(encoder.windows(Inputs(encoder.fixed_inputs(NUM_FIXED_INPUTS)))))
            output = features.output
            parts = [part.flatten() for part in (output, *features.poolings(output).values())]
        if not output.isfinite().all():
            return ()
        numbers = torch.arange(NUM_OUTPUTS) * OUTPUT_STEP
        return tuple(torch.cat([part[numbers % len(part)] for part in parts]).tolist())

    def embed_encoded(self, tokens: Tokens, layer_mean: LayerMean | None) -> dict[str, Tensor]:
        """Compute every embedding from the encoder's tokens, without gradient; see :meth:`embed_all`."""
        with frozen_use():
            features = self.features(tokens)
            embeddings = embeddings_of(features, layer_mean or self.layer_mean)
            if self.alignment is not None:
                embedding = self.alignment(embeddings)
            elif layer_mean is not None and self.raw_embedding.startswith("layer_mean"):
                embedding = self.read(features)  # by its own settings
            else:
                embedding = embeddings[self.raw_embedding]
            return {**embeddings, EMBEDDING: embedding}

    def embed(
        self,
        images: Tensor,
        pooling: Pooling | None = None,
        representation: Representation | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Return the embedding of each image or clip, (B, P) float32, without gradient.

        The default is the embedding that :attr:`embedding` describes. With ``pooling`` or ``representation``, return
        the raw embedding that they name, which is not aligned.

        Args:
            images: Images, (B, 3, height, width) uint8 of any size, or float of the model's size and normalized with
                ``encoder.config.image_mean`` and ``encoder.config.image_std``. For an audio model: waveforms, (B, L)
                float from -1 to 1, 16 kHz mono.
            pooling: ``cls``; ``mean``, of all tokens; or ``mean_patches``, of patches or frames.
            representation: ``output``, of the last block; or ``layer_mean``, the mean of the blocks' normalized FFN
                outputs.
            lengths: Number of samples of each waveform in a padded batch, (B,) int64.

        Raises:
            InputError: The model has no embedding with this pooling and representation.
            ValueError: The images or waveforms have a shape or dtype that the model does not take.

        Example:
            >>> student.embed(images).shape
            torch.Size([2, 192])
            >>> features = student.embed(images, pooling="mean")  # the output's mean over tokens
        """
        return self.embed_all(images, lengths)[self.choose_embedding(pooling, representation)]


class Transformer(Backbone):
    """Base of models with blocks after the encoder.

    Args:
        encoder, config, provenance: See :class:`Backbone`.
        blocks: The blocks after the encoder.

    Attributes:
        norm: The final norm, after the last block, or an Identity.
    """

    norm: nn.Module

    def __init__(
        self, encoder: Encoder, blocks: Sequence[FfnBlock], config: Any, provenance: Record | None = None
    ) -> None:
        super().__init__(encoder, config, provenance)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.Identity()

    @abstractmethod
    def block_contexts(self, x_BTD: Tensor, padding_mask: Tensor | None = None) -> list[Tensor | None]:
        """Return for each block an attention bias that broadcasts to (B, H, T, T), or rotary positions, or ``None``.

        ``padding_mask``, (B, T), is true for padding.
        """

    def iterate_blocks(
        self, x: Tensor, needs_last_output: bool = True, padding_mask: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the output and the FFN output of each block, (B, T, D) each, given the encoder's tokens, (B, T, D).

        Unless ``needs_last_output``, the last block's output is ``None``.
        """
        last = self.block_list[-1]
        for block, context in zip(self.block_list, self.block_contexts(x, padding_mask), strict=True):
            x, ffn_output_BTD = block(x, context, needs_last_output or block is not last)
            yield x, ffn_output_BTD

    def features(self, tokens: Tokens) -> Features:
        x, padding_mask, window_weights, _ = tokens
        return Features(
            lambda needs_last_output: self.iterate_blocks(x, needs_last_output, padding_mask),
            len(self.blocks),
            self.norm,
            self.num_extra_tokens,
            self.has_cls_token,
            padding_mask,
            window_weights,
        )

    def checkpoint_activations(self, enable: bool = True) -> None:
        from torch.utils.checkpoint import checkpoint  # takes a quarter of a second

        for block in self.block_list:
            if isinstance(block.forward, partial):  # an earlier call's
                block.forward = block.forward.args[0]
            if enable:
                # Nothing in a block is random.
                block.forward = partial(  # pyright: ignore[reportAttributeAccessIssue]: checkpoint's type is too wide
                    checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
                )
