"""Callbacks and loggers for any Composer Trainer; each is imported when it is first used."""

from importlib import import_module
from typing import Any

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


def __getattr__(name: str) -> Any:
    """Import a public name."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
