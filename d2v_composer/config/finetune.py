"""Every field of a YAML for recipes/finetune.py, beside those of any training."""

from dataclasses import dataclass, field

from d2v_composer.config.limits import duration, limited
from d2v_composer.config.schema import (
    AlgorithmsConfig,
    LabelledSetConfig,
    ModelConfig,
    OptimizerConfig,
    ShardLoaderConfig,
    TrainerConfig,
)

__all__ = ["ClassifierAlgorithmsConfig", "FinetuneConfig", "FinetuneLoaderConfig", "LayerwiseOptimizerConfig"]


@dataclass
class FinetuneLoaderConfig(ShardLoaderConfig):
    stream: bool = False
    """Read the train images of an MDS data set from its shards in each epoch, instead of once into memory. With
    ``remote``, ROOT/train is the cache."""


@dataclass
class LayerwiseOptimizerConfig(OptimizerConfig):
    layer_decay: float = limited(1.0, least=0.01, most=1)
    """The learning rate of a block over that of the block after it; the head's is ``lr``."""


@dataclass
class LabelSmoothingConfig:
    smoothing: float = limited(0.1, least=0, most=1)


@dataclass
class MixUpConfig:
    alpha: float = limited(0.2, least=0, most=1000)


@dataclass
class CutMixConfig:
    alpha: float = limited(1.0, least=0, most=1000)


@dataclass
class EMAConfig:
    half_life: str = limited("1000ba", check=duration("ba"))


@dataclass
class ClassifierAlgorithmsConfig(AlgorithmsConfig):
    """Composer's algorithms; null: off."""

    label_smoothing: LabelSmoothingConfig | None = None
    mixup: MixUpConfig | None = None
    cutmix: CutMixConfig | None = None
    ema: EMAConfig | None = None
    """Evaluate and save a moving average of the weights."""


@dataclass
class FinetuneConfig(TrainerConfig, ModelConfig):
    """Fields of recipes/finetune.py."""

    train_encoder: bool = False
    from_scratch: bool = False
    """Forget the weights: the same network, with random ones."""
    dataset: LabelledSetConfig | None = None
    """Required. Its train images train, its test images are the evaluation's."""
    train_loader: FinetuneLoaderConfig = field(default_factory=FinetuneLoaderConfig)
    eval_interval: str = limited("1ep", check=duration("ba", "ep"))
    optimizer: LayerwiseOptimizerConfig = field(default_factory=LayerwiseOptimizerConfig)
    algorithms: ClassifierAlgorithmsConfig = field(default_factory=ClassifierAlgorithmsConfig)
