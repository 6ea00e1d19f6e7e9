"""Callbacks for Composer's Trainer, ours and anybody's."""

from d2v_composer.callbacks.checkpoint_keeping import CheckpointKeeping
from d2v_composer.callbacks.finite_training import FiniteTraining
from d2v_composer.callbacks.graceful_stop import GracefulStop
from d2v_composer.callbacks.health import Health
from d2v_composer.callbacks.run_record import RunRecord
from d2v_composer.callbacks.sole_run import SoleRun
from d2v_composer.callbacks.step_time import StepTime
from d2v_composer.callbacks.zero_shot_retrieval import ZeroShotRetrieval

__all__ = [
    "CheckpointKeeping",
    "FiniteTraining",
    "GracefulStop",
    "Health",
    "RunRecord",
    "SoleRun",
    "StepTime",
    "ZeroShotRetrieval",
]
