"""Names of the callbacks and loggers that a YAML may choose."""

from composer import callbacks as composer_callbacks
from composer.loggers import TensorboardLogger, WandBLogger

from d2v_composer.callbacks.health import Health
from d2v_composer.callbacks.logging import JSONLLogger, RunMLFlowLogger

CALLBACKS = {
    "health": Health,
    "lr_monitor": composer_callbacks.LRMonitor,
    "memory_monitor": composer_callbacks.MemoryMonitor,
    "nan_monitor": composer_callbacks.NaNMonitor,
    "optimizer_monitor": composer_callbacks.OptimizerMonitor,
    "runtime_estimator": composer_callbacks.RuntimeEstimator,
    "speed_monitor": composer_callbacks.SpeedMonitor,
    "system_metrics_monitor": composer_callbacks.SystemMetricsMonitor,
}

LOGGERS = {
    "jsonl": JSONLLogger,
    "mlflow": RunMLFlowLogger,
    "tensorboard": TensorboardLogger,
    "wandb": WandBLogger,
}
