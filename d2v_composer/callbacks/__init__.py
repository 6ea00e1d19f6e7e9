"""Callbacks, loggers and an algorithm for Composer's Trainer."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from d2v_composer.callbacks.algorithms import GradientNorm as GradientNorm
    from d2v_composer.callbacks.alignment import AlignStudent as AlignStudent
    from d2v_composer.callbacks.checkpointing import NanGuard as NanGuard
    from d2v_composer.callbacks.health import Health as Health
    from d2v_composer.callbacks.logging import JSONLLogger as JSONLLogger
    from d2v_composer.callbacks.logging import ProgressLogger as ProgressLogger
    from d2v_composer.callbacks.logging import Throughput as Throughput
    from d2v_composer.callbacks.zero_shot_retrieval import ZeroShotRetrieval as ZeroShotRetrieval

MODULES = {
    "AlignStudent": "alignment",
    "GradientNorm": "algorithms",
    "Health": "health",
    "JSONLLogger": "logging",
    "NanGuard": "checkpointing",
    "ProgressLogger": "logging",
    "Throughput": "logging",
    "ZeroShotRetrieval": "zero_shot_retrieval",
}

if not TYPE_CHECKING:  # type checkers read the imports above

    def __getattr__(name: str) -> object:
        """Import and return the public class with this name."""
        if name not in MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
