"""Distil a frozen, self-supervised data2vec 2.0 image teacher into a small student, with Composer."""

from d2v_composer.callbacks import ZeroShotRetrieval
from d2v_composer.checkpoints.load import load_student, load_teacher
from d2v_composer.checkpoints.timm_student import d2v2_student
from d2v_composer.evaluation.retrieval import retrieval_accuracy
from d2v_composer.models.distillation import DistillationModel

__all__ = [
    "DistillationModel",
    "ZeroShotRetrieval",
    "d2v2_student",
    "load_student",
    "load_teacher",
    "retrieval_accuracy",
]
