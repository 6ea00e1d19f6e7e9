"""Students that are timm models without their classifiers.

Shapes: B images, N cells of a feature map, T tokens (cells and prefix tokens), C channels.
"""

from typing import Any

import timm
import torch
from timm.data.config import resolve_data_config
from torch import Tensor, nn

from d2v_composer.models.backbone import Backbone
from d2v_composer.models.configs import TimmNetworkConfig, height_and_width, parse_image_size
from d2v_composer.models.encoder import Inputs, Tokens
from d2v_composer.models.features import Features
from d2v_composer.models.images import PixelEncoder
from d2v_composer.models.names import JOINT, timm_name
from d2v_composer.models.provenance import Record
from d2v_composer.system.errors import reason

TimmModule = Any
"""A timm module, whose attributes torch's types do not declare."""


def create_network(
    config: TimmNetworkConfig, pretrained: bool = False, num_classes: int = 0
) -> tuple[TimmModule, Record]:
    """Build a timm model, by default without its classifier.

    Returns:
        The model, and the options with which ``timm.create_model`` builds the model.
    """
    name = timm_name(config.model)
    options: Any = {"num_classes": num_classes} | ({} if config.in_chans == 3 else {"in_chans": config.in_chans})
    sized = {"img_size": height_and_width(config.image_size)} | options
    try:
        try:
            model = timm.create_model(name, pretrained, **sized)
            options = sized
        except TypeError:  # no such argument: the model takes images of any size
            model = timm.create_model(name, pretrained, **options)
    except Exception as error:
        raise ValueError(f"{config.model}: {reason(error)}") from error
    return model, options


def load_pretrained(model: str) -> "TimmStudent":
    """Load a timm model with timm's weights and preprocessing.

    If the model ends with a projection, the projection computes the embedding.
    """
    student, pretrained = TimmStudent(config_of(model), pretrained=True), timm.get_pretrained_cfg(timm_name(model))
    if width := projection_width(pretrained.num_classes if pretrained else None):
        projection = create_network(student.config, pretrained=True, num_classes=width)[0].get_classifier()
        student.align(projection.weight.data, projection.bias.data, JOINT, "teacher")
    return student


def config_of(model: str) -> TimmNetworkConfig:
    """Return the config of a timm model with timm's preprocessing."""
    pretrained = timm.get_pretrained_cfg(timm_name(model))
    data = resolve_data_config(pretrained_cfg=pretrained.to_dict() if pretrained else {})
    in_chans, *shape = data["input_size"]
    return TimmNetworkConfig(
        model=model,
        timm=timm.__version__,
        in_chans=in_chans,
        image_size=parse_image_size(tuple(shape)),
        image_mean=data["mean"],
        image_std=data["std"],
        interpolation=data["interpolation"],
    )


def projection_width(num_classes: int | None) -> int:
    """Return ``num_classes`` of a timm model if this number is the width of a projection, else 0.

    Multiples of 64 count as widths of projections, all other numbers as numbers of classes.
    """
    return 0 if num_classes is None or num_classes % 64 else num_classes


def classifier_prefixes(config: TimmNetworkConfig) -> tuple[str, ...]:
    """Return the prefixes of the names of a timm model's classifier tensors."""
    pretrained = timm.get_pretrained_cfg(timm_name(config.model))
    names = getattr(pretrained, "classifier", None) or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


class TimmBackbone(PixelEncoder):
    """A whole timm model as an encoder; the tokens are the cells of the last feature map.

    Args:
        config: The model's name and preprocessing.
        pretrained: Start from timm's weights, from the Hugging Face hub or its cache.

    Attributes:
        options: Options with which ``timm.create_model`` builds this model.
    """

    config: TimmNetworkConfig

    def __init__(self, config: TimmNetworkConfig, pretrained: bool) -> None:
        super().__init__(config)
        shape = height_and_width(config.image_size)
        with torch.no_grad(), torch.device("meta"):
            self.model, self.options = create_network(config)
            try:
                features = self.model.eval().forward_features(torch.zeros(1, config.in_chans, *shape))
                pooled = self.model.forward_head(features, pre_logits=True)
                self.num_prefix_tokens = getattr(self.model, "num_prefix_tokens", 0)
                self.grid_size = self.find_grid(features)
                self.num_channels, self.num_pooled = self.cells(features).shape[-1], pooled.shape[-1]
            except Exception as error:
                raise ValueError(f"{config.model} gives no grid of features for images of {shape} pixels") from error
        self.model, _ = create_network(config, pretrained)

    @property
    def embed_dim(self) -> int:
        return self.num_channels

    def find_grid(self, features: Tensor) -> tuple[int, int]:
        """Return the grid's (height, width) in cells, given a feature map with 4 dimensions, or tokens with 3."""
        if features.ndim == 4:
            height, width = features.shape[1:3] if self.is_channels_last else features.shape[2:]
            return height, width
        num_cells = features.shape[1] - self.num_prefix_tokens
        declared = getattr(getattr(self.model, "patch_embed", None), "grid_size", None)
        side = round(num_cells**0.5)
        grid = (
            (side, side) if declared is None or declared[0] * declared[1] != num_cells else (declared[0], declared[1])
        )
        if features.ndim != 3 or grid[0] * grid[1] != num_cells:
            raise ValueError(features.shape)
        return grid

    @property
    def is_channels_last(self) -> bool:
        return getattr(self.model, "output_fmt", "NCHW") == "NHWC"

    def cells(self, features: Tensor) -> Tensor:
        """Return the cells of a feature map, or the tokens without prefix tokens, (B, N, C)."""
        if features.ndim == 3:
            return features[:, self.num_prefix_tokens :]
        return features.flatten(1, 2) if self.is_channels_last else features.flatten(2).transpose(1, 2)

    def timm_tensors(self, model: Any, head: nn.Module | None) -> dict[str, Tensor]:
        """Return the state dict of ``model``, which has a classifier, with this encoder's and ``head``'s weights."""
        tensors = model.state_dict() | self.model.state_dict()
        for prefix in classifier_prefixes(self.config):  # a convolution, or two layers
            for name, tensor in ({} if head is None else head.state_dict()).items():
                tensors[prefix + name] = tensor.reshape_as(model.get_parameter(prefix + name)).clone()
        return tensors

    def embed_tokens(self, inputs: Inputs) -> Tensor:
        """Return timm's features: (B, C, height, width), (B, height, width, C) or (B, T, C)."""
        return self.model.forward_features(self.prepare(inputs.values))

    def forward(self, inputs: Inputs) -> Tokens:
        features = self.embed_tokens(inputs)
        return Tokens(self.cells(features), pooled=self.model.forward_head(features, pre_logits=True))


class TimmStudent(Backbone):
    """A student whose encoder is a whole timm model.

    The raw embedding ``output_cls`` is the result of timm's ``forward_head(…, pre_logits=True)``; ``output_mean`` and
    ``output_mean_patches`` are both the mean of the feature map.

    Args:
        config, pretrained: See :class:`TimmBackbone`.
        provenance: See :class:`~d2v_composer.models.backbone.Backbone`.
    """

    encoder: TimmBackbone

    def __init__(self, config: TimmNetworkConfig, provenance: Record | None = None, pretrained: bool = False) -> None:
        super().__init__(TimmBackbone(config, pretrained), config, provenance)

    @property
    def raw_names(self) -> list[str]:
        return ["output_cls", "output_mean", "output_mean_patches"]

    def width_of(self, name: str) -> int:
        return self.encoder.num_pooled if name == "output_cls" else self.encoder.num_channels

    @property
    def alignment_inputs(self) -> list[str]:
        return ["output_cls"]  # so that the alignment is timm's classifier

    def features(self, tokens: Tokens) -> Features:
        return Features.of_layer(tokens.x, 0, True, pooled=tokens.pooled)

    def resized(self, image_size: Any) -> "TimmStudent":
        """Return a student with the same weights for images of another size.

        Raises:
            ValueError: timm cannot build the model for this size.
        """
        resized = TimmStudent(self.config.changed(image_size=image_size), self.provenance)
        weights: Any = {"state_dict": self.encoder.model.state_dict(), "num_classes": 0}
        name, options = timm_name(self.config.model), resized.encoder.options
        resized.encoder.model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=weights, **options)
        return resized.eval()

    def checkpoint_activations(self, enable: bool = True) -> None:
        self.encoder.model.set_grad_checkpointing(enable)  # an AssertionError if timm has none for this model
