"""Callbacks, algorithms and loggers for Composer's Trainer; each is imported when it is first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2v_composer.callbacks.algorithms import GradientNorm, SeededBatches
    from d2v_composer.callbacks.checkpointing import Checkpoints, NanGuard
    from d2v_composer.callbacks.health import Health
    from d2v_composer.callbacks.logging import JSONLLogger, ProgressLogger, Throughput, Uploads
    from d2v_composer.callbacks.run_record import RunRecord
    from d2v_composer.callbacks.zero_shot_retrieval import ZeroShotRetrieval

__all__ = [
    "Checkpoints",
    "GradientNorm",
    "Health",
    "JSONLLogger",
    "NanGuard",
    "ProgressLogger",
    "RunRecord",
    "SeededBatches",
    "Throughput",
    "Uploads",
    "ZeroShotRetrieval",
]
MODULES = {
    "algorithms": ("GradientNorm", "SeededBatches"),
    "checkpointing": ("Checkpoints", "NanGuard"),
    "health": ("Health",),
    "logging": ("JSONLLogger", "ProgressLogger", "Throughput", "Uploads"),
    "run_record": ("RunRecord",),
    "zero_shot_retrieval": ("ZeroShotRetrieval",),
}


def __getattr__(name: str) -> Any:
    """Import a public name."""
    for module, names in MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
