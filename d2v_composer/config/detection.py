"""Fields of a YAML that trains a detector."""

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
    """The optimizer, with a separate learning rate for the backbone."""

    backbone_lr_ratio: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Ratio of the backbone's learning rate to ``lr``, the learning rate of all other layers."""


class DetectConfig(LabeledRunConfig):
    """Fields of recipes/detect.py."""

    model: PathText
    """The backbone: timm/NAME, or the path or address (https://, s3://, …) of an exported student or a training
    checkpoint."""
    pretrained: bool = True
    """Load timm's pretrained weights of a timm/NAME backbone from the Hugging Face hub. false: start the backbone from
    random weights."""
    image_size: Annotated[ImageSizeText | None, FIXED] = None
    """Size to which images are resized and padded: pixels per side, or HEIGHTxWIDTH; null: the backbone's image
    size."""
    channels: Annotated[Count, FIXED] = 256
    """Number of channels of the feature pyramid and of the heads."""
    frozen_stages: Annotated[Whole, FIXED] = 0
    """Number of parts of the backbone to freeze, counted from the input. The parts of a timm model are the stem and
    each stage or block; those of other models are the shared encoder, which is always frozen, and each block."""
    dataset: CocoSplits
    optimizer: Annotated[DetectorOptimizerConfig, FIXED] = DetectorOptimizerConfig()  # pyright: ignore[reportIncompatibleVariableOverride]
