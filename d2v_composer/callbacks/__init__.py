"""Callbacks, algorithms and loggers for Composer's Trainer."""

from d2v_composer.callbacks.checkpoint_retention import CheckpointRetention
from d2v_composer.callbacks.graceful_stop import GracefulStop
from d2v_composer.callbacks.gradient_norm import GradientNorm
from d2v_composer.callbacks.health import Health
from d2v_composer.callbacks.jsonl_logger import JSONLLogger
from d2v_composer.callbacks.nan_guard import NanGuard
from d2v_composer.callbacks.pictures import RetrievalPictures
from d2v_composer.callbacks.progress_logger import ProgressLogger
from d2v_composer.callbacks.run_folder_lock import RunFolderLock
from d2v_composer.callbacks.run_record import RunRecord
from d2v_composer.callbacks.seeded_batches import SeededBatches
from d2v_composer.callbacks.throughput import Throughput
from d2v_composer.callbacks.zero_shot_retrieval import ZeroShotRetrieval

__all__ = [
    "CheckpointRetention",
    "GracefulStop",
    "GradientNorm",
    "Health",
    "JSONLLogger",
    "NanGuard",
    "ProgressLogger",
    "RetrievalPictures",
    "RunFolderLock",
    "RunRecord",
    "SeededBatches",
    "Throughput",
    "ZeroShotRetrieval",
]
