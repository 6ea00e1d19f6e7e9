"""Names of the callbacks and loggers that a YAML may choose."""

from composer import callbacks as composer_callbacks
from composer.loggers import WandBLogger

from d2v_composer.callbacks.health import Health
from d2v_composer.callbacks.jsonl_logger import JSONLLogger
from d2v_composer.callbacks.mlflow_logger import RunMLFlowLogger
from d2v_composer.callbacks.tensorboard_logger import RunTensorboardLogger

__all__ = ["CALLBACKS", "LOGGERS"]

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
    "tensorboard": RunTensorboardLogger,
    "wandb": WandBLogger,
}
