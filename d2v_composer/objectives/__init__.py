"""Objectives: targets that a student regresses, and losses that measure how far it is off."""

from d2v_composer.objectives.embedding import EmbeddingRegression
from d2v_composer.objectives.objective import Objective
from d2v_composer.objectives.tokens import LayerRegression

OBJECTIVES: dict[str, type[Objective]] = {"tokens": LayerRegression, "embedding": EmbeddingRegression}
"""Name of each objective, in the section ``objectives`` of a YAML and in logs → its class."""
