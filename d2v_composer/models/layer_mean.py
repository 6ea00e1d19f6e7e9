"""The mean of a model's normalized layers: target, prediction and embedding.

Shapes: B inputs, E extra tokens, N patches or frames, T = E + N tokens, D channels.
"""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, Literal, NamedTuple, get_origin

from torch import Tensor

from d2v_composer.models.configs import check_whole
from d2v_composer.models.features import Features
from d2v_composer.models.names import PROJECTED, ExtraTokens, Normalization, Prediction, TargetSource, check_choice
from d2v_composer.models.targets import norm_mean


class LayerMean(NamedTuple):
    """The settings by which layers become target, prediction and ``layer_mean`` embeddings, the same for all three."""

    normalization: Normalization = "instance"
    """Normalization of each layer: ``instance`` over tokens, or ``layer`` over channels."""
    final_layer_norm: bool = True
    """End with a LayerNorm; data2vec 2.0's audio models do not."""
    source: TargetSource = "ffn"
    """Layers of the target: FFN outputs, or the blocks' outputs, ``block``."""
    average_top_k_layers: int | None = None
    """Number of last blocks in the target; ``None``: all."""
    extra_tokens: ExtraTokens = "regress"
    """``regress`` them like patches; ``drop`` them before InstanceNorm, as data2vec 2.0's pre-training does; or regress
    them ``only``."""
    prediction: Prediction = "layer_mean"
    """What is regressed: ``layer_mean`` of the student's FFN outputs, or ``last_block``, its output, not normalized."""
    dataset_norm: bool = False
    """Normalize the target's layers by fixed numbers of the data set, in place of ``normalization``."""
    norm_mean: Callable[..., Tensor] = norm_mean
    """:func:`~d2v_composer.models.targets.norm_mean`, or its compiled version."""

    @classmethod
    def of(cls, config: Any) -> "LayerMean":
        """Build the settings in a teacher's or a student's config."""
        return cls(config.normalization, config.final_layer_norm, average_top_k_layers=config.average_top_k_layers)

    def changed(self, **options: Any) -> "LayerMean":
        """Return a copy with other values; ``None`` keeps a value.

        Raises:
            ValueError: A value is unknown.
        """
        changed = self._replace(**{name: value for name, value in options.items() if value is not None})
        for name, choices in LayerMean.__annotations__.items():
            if get_origin(choices) is Literal:
                check_choice(name, getattr(changed, name), choices)
        return changed

    def target(self, features: Features, norm_mean: Callable[..., Tensor] | None = None) -> Tensor:
        """Compute the target from a teacher's features: the regressed tokens of (B, T, D), float32.

        Args:
            features: The teacher's.
            norm_mean: In place of the attribute.

        Raises:
            ValueError: There are fewer layers.
        """
        top_k = features.num_layers if self.average_top_k_layers is None else self.average_top_k_layers
        check_whole("average_top_k_layers", top_k, 1, features.num_layers)
        layers = islice(features.layers(self.source), features.num_layers - top_k, None)
        regressed = self.regressed(features)
        norm_mean = self.norm_mean if norm_mean is None else norm_mean
        options = self.normalization, self.final_layer_norm, features.padding_mask
        return norm_mean(layers, regressed.start, *options)[:, regressed]

    def average(self, layers: Iterable[Tensor], features: Features, num_dropped: int = 0) -> Tensor:
        """Compute the mean of layers, (B, T, D) float32; statistics skip padding and ``num_dropped`` first tokens."""
        return self.norm_mean(layers, num_dropped, self.normalization, self.final_layer_norm, features.padding_mask)

    def regressed(self, features: Features) -> slice:
        """Return the slice of tokens that the loss counts."""
        first = features.num_extra_tokens if self.extra_tokens == "drop" else 0
        return slice(first, features.num_extra_tokens if self.extra_tokens == "only" else None)

    def embeddings(self, features: Features) -> dict[str, Tensor]:
        """Compute every embedding of a model, (B, D) float32, by name: poolings of its output and of its layers."""
        if features.pooled is not None:
            output = features.output
            found = features.poolings(output, "output_")
        else:
            output, mean = features.with_output(lambda layers: self.average(layers, features))
            both = features.poolings(output, "output_") | features.poolings(mean, "layer_mean_")
            found = {name: both[name] for name in self.names(features.has_cls_token)}
        return found if features.project is None else found | {PROJECTED: features.project(features, output).float()}

    def names(self, has_cls_token: bool) -> list[str]:
        """Return the names of all embeddings.

        Without a final LayerNorm, the mean over tokens of an instance-normalized layer is 0, which embeds nothing.
        """
        names = ["cls", "mean", "mean_patches"][not has_cls_token :]
        is_zero = self.normalization == "instance" and not self.final_layer_norm
        of_layers = [name for name in names if name == "cls" or not is_zero]
        return [*(f"output_{name}" for name in names), *(f"layer_mean_{name}" for name in of_layers)]
