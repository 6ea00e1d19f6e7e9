"""Distill a frozen data2vec 2.0 teacher of images or audio, or a timm ViT, into a small student.

Example:
    >>> from d2v_composer import load_student
    >>> student = load_student("student.safetensors")
    >>> embeddings = student.embed(images)  # (B, 3, height, width) uint8 → (B, P), as the teacher's
"""

# A name is imported when it is first used: torch, Composer and timm take seconds together, and few programs use all.

import sys
from importlib import import_module, metadata
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

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
    "d2v2_student",
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


if not TYPE_CHECKING:  # for which each name has its own type

    def __getattr__(name: str) -> object:
        """Import a public name."""
        if name not in MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def d2v2_student(pretrained: bool = False, **kwargs: Any) -> Any:
    """Build the thesis's student as a timm model, for ``timm.create_model("d2v2_student", checkpoint_path=FILE)``.

    FILE is one that ``d2v export`` wrote; loading it sets the sizes.

    Args:
        pretrained: Not supported: no weights are published.
        **kwargs: Arguments of a timm ViT: ``num_classes`` (the width of the file's alignment: the output is the
            embedding; 0: the output is the features; another number: the head is new), ``global_pool``.

    Returns:
        A ``torch.nn.Module``: normalized images, (B, 3, S, S) float → (B, ``num_classes``).

    Example:
        >>> import timm, d2v_composer
        >>> student = timm.create_model("d2v2_student", checkpoint_path="student.safetensors", num_classes=10)
        >>> logits = student(torch.rand(2, 3, 32, 32))  # (2, 10); the head is new, the rest is the file's
    """
    return import_module(f"{__name__}.export.programs").build_timm_student(pretrained, **kwargs)


class _FindTimm:
    """Import hook that finds timm as usual, and registers the student once timm is really imported."""

    def find_spec(self, fullname: str, *args: Any) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, *args) if fullname == "timm" else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                import_module("timm.models").register_model(d2v2_student)

            spec.loader.exec_module = exec_module  # for this import alone
        return spec


if "timm" in sys.modules:
    import_module("timm.models").register_model(d2v2_student)
else:
    sys.meta_path.insert(0, _FindTimm())
