"""Every field of a detector's YAML, besides the fields that all runs have."""

from typing import Annotated

from pydantic import Field

from d2v_composer.config.reference import ImageSizeText
from d2v_composer.config.resume import FIXED
from d2v_composer.config.schema import LabeledRunConfig, OptimizerConfig, Section
from d2v_composer.config.types import Count, LocalFolder, PathText, Whole


class CocoConfig(Section):
    """A split of the data set: images with boxes."""

    images: LocalFolder
    """Folder of the images."""
    annotations: LocalFolder
    """JSON file in COCO's format, with the boxes."""


class CocoSplits(Section):
    """The data set: images with boxes, to train on and to test on."""

    train: CocoConfig
    test: CocoConfig


class DetectorOptimizerConfig(OptimizerConfig):
    """The optimizer, with a learning rate of its own for the backbone."""

    backbone_lr_ratio: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Ratio of the backbone's learning rate to ``lr``, the learning rate of all other layers."""


class DetectConfig(LabeledRunConfig):
    """Fields of recipes/detect.py."""

    model: PathText
    """The backbone: an exported student or a training checkpoint (a path, https://, s3://, …), or timm/NAME."""
    pretrained: bool = True
    """For timm/NAME: start from timm's weights, from the Hugging Face hub. false: from random weights."""
    image_size: Annotated[ImageSizeText | None, FIXED] = None
    """Pixels per side, or HEIGHTxWIDTH, to which images are enlarged or shrunk, with a margin that keeps their
    proportions; null: the backbone's."""
    channels: Annotated[Count, FIXED] = 256
    """Number of channels of the feature pyramid and of the heads."""
    frozen_stages: Annotated[Whole, FIXED] = 0
    """Number of first parts of the backbone that are not trained: 1, the stem (in a student of blocks, the encoder,
    which is always frozen); 2, also the first stage or block; and so on."""
    dataset: CocoSplits
    optimizer: Annotated[DetectorOptimizerConfig, FIXED] = DetectorOptimizerConfig()  # pyright: ignore[reportIncompatibleVariableOverride]
