"""The callbacks, loggers, algorithms and optimizers that a YAML may choose by name."""

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
"""Name in the section ``callbacks`` → 'module:class'."""

ALGORITHMS = {
    "gradient_clipping": "d2v_composer.callbacks.algorithms:GradientClipping",
}
"""Name in the section ``algorithms`` → 'module:class'."""

LOGGERS = {
    "jsonl": "d2v_composer.callbacks.logging:JSONLLogger",
    "mlflow": "d2v_composer.callbacks.logging:RunMLFlowLogger",
    "tensorboard": "composer.loggers:TensorboardLogger",
    "wandb": "composer.loggers:WandBLogger",
}
"""Name in the section ``loggers`` → 'module:class'."""


def about(kind: str, names: Iterable[str]) -> str:
    """Return the description of the field ``callbacks`` or ``loggers``."""
    return (
        f"Name of a {kind} → its arguments, {{}} for the defaults. null turns off a {kind} that the YAML has. Names: "
        f"{', '.join(names)}, and ``ext/NAME`` for a {kind} of an installed package."
    )


class OptimizerKind(NamedTuple):
    """An optimizer that a YAML may choose."""

    path: str
    """Class of the optimizer, as 'module:class'."""
    arguments: dict[str, bool]
    """Name → value of further arguments with which the class is always called."""

    @property
    def log_key(self) -> str:
        """Key under which Composer's LRMonitor logs the learning rate of the first parameter group."""
        return f"lr-{self.path.partition(':')[2]}/group0"


OPTIMIZERS = {
    "adamw": OptimizerKind("torch.optim:AdamW", {"fused": True}),
    "decoupled_adamw": OptimizerKind("composer.optim:DecoupledAdamW", {}),
}
"""Value of ``optimizer.name`` → optimizer."""
