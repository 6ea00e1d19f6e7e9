"""Read the provenance of models: the records of where weights come from."""

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

Json = Any
"""Content of a JSON or YAML file, or a part of it."""
Record = dict[str, Json]
"""A record from JSON or YAML: name → value of any type."""

# Largest difference of two records of one teacher's outputs, relative to their norm. Processors differ by less than
# 1e-5; weights converted to bfloat16 moved the outputs of tests/golden's audio teacher by 0.016.
IDENTITY_TOLERANCE = 0.03


def value_at(record: Json, key: str) -> Json:
    """Return the value under a dotted key in nested mappings; ``None`` if the key is missing."""
    for part in key.split("."):
        record = record.get(part) if isinstance(record, Mapping) else None
    return record


def distillation_of(provenance: Json) -> Json:
    """Return the record of the run that distilled a student, even if the student has been fine-tuned since."""
    before = value_at(provenance, "model.provenance")
    return provenance if before is None else distillation_of(before)


def has_tuned_encoder(provenance: Json) -> bool:
    """Return True if the distillation or a fine-tuning of a student trained the student's encoder."""
    before = value_at(provenance, "model.provenance")
    if before is None:
        return bool(value_at(provenance, "student.own_encoder"))
    return bool(value_at(provenance, "config.train_encoder")) or has_tuned_encoder(before)


def is_teacher_of(record: Json, own: Record) -> bool:
    """Return True if ``own`` describes the teacher in a student's record: equal hashes, and almost equal outputs."""
    sha256, outputs = (value_at(record, f"teacher.{key}") for key in ("sha256", "outputs"))
    return sha256 == own.get("sha256") and are_of_one_teacher(outputs, own.get("outputs"))


def are_of_one_teacher(outputs: Json, expected: Json) -> bool:
    """Return True if two records of outputs differ by at most ``IDENTITY_TOLERANCE`` times the norm of ``expected``."""
    with suppress(TypeError, ValueError):  # a file's record may hold anything
        return math.dist(outputs, expected) <= IDENTITY_TOLERANCE * math.hypot(*expected)
    return False
