"""Load the student of a checkpoint of ``recipes/finetune.py``, with its head."""

from pathlib import Path
from typing import Any

from torch import Tensor

from d2v_composer.checkpoints.headline import parse_headline
from d2v_composer.checkpoints.stored_config import CONFIG_TENSOR, check_student
from d2v_composer.models.student import Student
from d2v_composer.system.errors import InputError

__all__ = ["is_finetuned", "load_finetuned", "without_head"]


def is_finetuned(contents: dict[str, Any]) -> bool:
    """Return whether a Composer checkpoint's run was a fine-tuning."""
    try:
        return "model" in contents["state"]["callbacks"]["RunRecord"]["record"]
    except (LookupError, TypeError):
        return False


def load_finetuned(checkpoint: Path, contents: dict[str, Any]) -> Student:
    """Build a fine-tuned student with its head, as timm's model; the run's record is its provenance.

    Args:
        checkpoint: Named in errors.
        contents: The checkpoint's; no other file is needed.

    Raises:
        InputError: It holds a fine-tuned teacher, or unusable sizes or tensors.
    """
    from d2v_composer.checkpoints.timm_student import POOLINGS, TimmStudent  # timm takes seconds to import

    try:
        record = dict(contents["state"]["callbacks"]["RunRecord"]["record"])
        about, tensors = dict(record["model"]), dict(contents["state"]["model"])
        kind, sizes, (representation, pooling) = about["kind"], about.get("sizes"), parse_headline(about)
        head = {name: each for name, each in tensors.items() if name.startswith("head.")}
        num_classes = int(head["head.bias"].shape[0])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{checkpoint}: not a checkpoint of recipes/finetune.py ({type(error).__name__}: {error})"
        ) from error
    if kind != "student" or sizes is None:
        raise InputError(f"{checkpoint}: is a fine-tuned teacher: only a student can be exported or embedded")
    backbone = {
        name.removeprefix("backbone."): each
        for name, each in tensors.items()
        if name.startswith("backbone.") and isinstance(each, Tensor)
    }
    encoder_config, student_config = check_student(checkpoint, sizes, backbone)
    pool = next(name for name, each in POOLINGS.items() if each == pooling)
    student = TimmStudent(encoder_config, student_config, num_classes, pool, representation)
    student.load_state_dict(backbone | head | {CONFIG_TENSOR: getattr(student, CONFIG_TENSOR)})
    student.provenance = record
    return student.eval()


def without_head(student: Student) -> Student:
    """Return a fine-tuned student without its head, on the same encoder; another student as it is."""
    if type(student) is Student:
        return student
    plain = Student(student.encoder, student.config, student.provenance)
    tensors = student.state_dict()
    plain.load_state_dict({name: tensors[name] for name in plain.state_dict()})
    return plain.eval()
