"""Callbacks for Composer's Trainer, ours and anybody's."""

from d2v_composer.callbacks.finite_loss import FiniteLoss
from d2v_composer.callbacks.graceful_stop import GracefulStop
from d2v_composer.callbacks.health import Health
from d2v_composer.callbacks.run_record import RunRecord
from d2v_composer.callbacks.step_time import StepTime
from d2v_composer.callbacks.zero_shot_retrieval import ZeroShotRetrieval

__all__ = ["FiniteLoss", "GracefulStop", "Health", "RunRecord", "StepTime", "ZeroShotRetrieval"]
