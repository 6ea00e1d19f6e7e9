"""The callbacks, loggers, algorithms and optimizers that a YAML may choose; their classes are imported when chosen."""

from collections.abc import Iterable
from typing import NamedTuple

CALLBACKS = {
    "health": "d2v_composer.callbacks.health:Health",
    "lr_monitor": "composer.callbacks:LRMonitor",
    "memory_monitor": "composer.callbacks:MemoryMonitor",
    "optimizer_monitor": "composer.callbacks:OptimizerMonitor",
    "runtime_estimator": "composer.callbacks:RuntimeEstimator",
    "speed_monitor": "composer.callbacks:SpeedMonitor",
    "system_metrics_monitor": "composer.callbacks:SystemMetricsMonitor",
}
"""Name in the section ``callbacks`` → class."""

ALGORITHMS = {
    "gradient_clipping": "d2v_composer.callbacks.algorithms:GradientClipping",
    "mixup": "composer.algorithms:MixUp",
    "cutmix": "composer.algorithms:CutMix",
    "label_smoothing": "composer.algorithms:LabelSmoothing",
}
"""Name in the section ``algorithms`` → class; its arguments are the fields of this name."""

LOGGERS = {
    "jsonl": "d2v_composer.callbacks.logging:JSONLLogger",
    "mlflow": "d2v_composer.callbacks.logging:RunMLFlowLogger",
    "tensorboard": "composer.loggers:TensorboardLogger",
    "wandb": "composer.loggers:WandBLogger",
}
"""Name in the section ``loggers`` → class."""


def about(kind: str, names: Iterable[str]) -> str:
    """Describe a field that gives each chosen callback or logger its arguments."""
    return (
        f"Name of a {kind} → its arguments, {{}} for the defaults. null turns off a {kind} that the YAML has. Names: "
        f"{', '.join(names)}, and ``ext/NAME`` for a {kind} of an installed package."
    )


class OptimizerKind(NamedTuple):
    """An optimizer that a YAML may choose; it takes the fields of ``OptimizerConfig``."""

    path: str
    """The class, imported when chosen."""
    arguments: dict[str, bool]
    """Arguments besides the fields."""

    @property
    def log_key(self) -> str:
        """The key below which Composer's LRMonitor logs the learning rate of the first group."""
        return f"lr-{self.path.partition(':')[2]}/group0"


OPTIMIZERS = {
    "adamw": OptimizerKind("torch.optim:AdamW", {"fused": True}),
    "decoupled_adamw": OptimizerKind("composer.optim:DecoupledAdamW", {}),
}
"""Name in ``optimizer.name`` → optimizer."""
