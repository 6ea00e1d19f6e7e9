"""Callbacks, algorithms and loggers for Composer's Trainer."""

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
