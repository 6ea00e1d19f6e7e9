"""Distill a frozen teacher model of images or audio into a small student.

Example:
    >>> from d2v_composer import load_student
    >>> student = load_student("student.safetensors")
    >>> embeddings = student.embed(images)  # (B, 3, height, width) uint8 → (B, P) float32
"""

# A name is imported when it is first used: torch, Composer and timm take seconds together, and few programs use all.

from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from d2v_composer.callbacks.zero_shot_retrieval import ZeroShotRetrieval
    from d2v_composer.checkpoints.load import load_student, load_teacher
    from d2v_composer.config.load import load_config
    from d2v_composer.embedding.embedder import Embedder
    from d2v_composer.evaluation.linear_probe import linear_probe_accuracy
    from d2v_composer.evaluation.nearest_neighbors import knn_accuracy, neighbor_agreement, retrieval_accuracy
    from d2v_composer.models.frozen_model import FrozenModel
    from d2v_composer.objectives.distillation import DistillationModel
    from d2v_composer.runs.distill import train_student
    from d2v_composer.sources.labeled import load_labeled_set

__all__ = [
    "DistillationModel",
    "Embedder",
    "FrozenModel",
    "ZeroShotRetrieval",
    "knn_accuracy",
    "linear_probe_accuracy",
    "load_config",
    "load_labeled_set",
    "load_student",
    "load_teacher",
    "neighbor_agreement",
    "retrieval_accuracy",
    "train_student",
]

__version__ = metadata.version("d2v-composer")

MODULES = {
    "DistillationModel": "objectives.distillation",
    "Embedder": "embedding.embedder",
    "FrozenModel": "models.frozen_model",
    "ZeroShotRetrieval": "callbacks.zero_shot_retrieval",
    "knn_accuracy": "evaluation.nearest_neighbors",
    "linear_probe_accuracy": "evaluation.linear_probe",
    "load_config": "config.load",
    "load_labeled_set": "sources.labeled",
    "load_student": "checkpoints.load",
    "load_teacher": "checkpoints.load",
    "neighbor_agreement": "evaluation.nearest_neighbors",
    "retrieval_accuracy": "evaluation.nearest_neighbors",
    "train_student": "runs.distill",
}


if not TYPE_CHECKING:  # a type checker reads the imports above

    def __getattr__(name: str) -> object:
        if name not in MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
