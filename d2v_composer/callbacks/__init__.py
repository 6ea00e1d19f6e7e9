"""Callbacks, algorithms and loggers for Composer's Trainer; each is imported when it is first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2v_composer.callbacks.algorithms import GradientNorm, SeededBatches
    from d2v_composer.callbacks.checkpointing import CheckpointRetention, GracefulStop, NanGuard, RunFolderLock
    from d2v_composer.callbacks.health import Health
    from d2v_composer.callbacks.logging import JSONLLogger, ProgressLogger, Throughput
    from d2v_composer.callbacks.run_record import RunRecord
    from d2v_composer.callbacks.zero_shot_retrieval import ZeroShotRetrieval

__all__ = [
    "CheckpointRetention",
    "GracefulStop",
    "GradientNorm",
    "Health",
    "JSONLLogger",
    "NanGuard",
    "ProgressLogger",
    "RunFolderLock",
    "RunRecord",
    "SeededBatches",
    "Throughput",
    "ZeroShotRetrieval",
]
MODULES = {
    "algorithms": ("GradientNorm", "SeededBatches"),
    "checkpointing": ("CheckpointRetention", "GracefulStop", "NanGuard", "RunFolderLock"),
    "health": ("Health",),
    "logging": ("JSONLLogger", "ProgressLogger", "Throughput"),
    "run_record": ("RunRecord",),
    "zero_shot_retrieval": ("ZeroShotRetrieval",),
}


def __getattr__(name: str) -> Any:
    """Import a public name."""
    for module, names in MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
