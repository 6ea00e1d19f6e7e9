"""Read the provenance that models and files carry: the record of the run, or the runs, that made them."""

from collections.abc import Mapping
from typing import Any


def value_at(record: Any, key: str) -> Any:
    """Return the value of a dotted key; ``None`` if it is missing."""
    for part in key.split("."):
        record = record.get(part) if isinstance(record, Mapping) else None
    return record


def distillation_of(provenance: Any) -> Any:
    """Return the record of the run that distilled a student, even if it was fine-tuned since."""
    before = value_at(provenance, "model.provenance")
    return provenance if before is None else distillation_of(before)


def has_tuned_encoder(provenance: Any) -> bool:
    """Return True if the run that distilled a student, or a fine-tuning run, trained its encoder too."""
    before = value_at(provenance, "model.provenance")
    if before is None:
        return bool(value_at(provenance, "student.own_encoder"))
    return bool(value_at(provenance, "config.train_encoder")) or has_tuned_encoder(before)


def is_teacher_of(record: Any, model: Any) -> bool:
    """Return True if a model is the teacher that a student's record names."""
    return value_at(record, "teacher.sha256") == value_at(model.provenance, "sha256") is not None
