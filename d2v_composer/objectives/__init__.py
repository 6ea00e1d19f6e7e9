"""The objectives, which are the terms of the training loss, and the function that builds them."""

from collections.abc import Mapping

from torch import nn

from d2v_composer.models.backbone import Backbone
from d2v_composer.models.teacher import Teacher
from d2v_composer.objectives.embedding import EmbeddingRegression
from d2v_composer.objectives.objective import Objective
from d2v_composer.objectives.tokens import LayerRegression
from d2v_composer.system.errors import errors_of

OBJECTIVES: dict[str, type[Objective]] = {"tokens": LayerRegression, "embedding": EmbeddingRegression}
"""Name of each objective, in the section ``objectives`` of a YAML and in logs → its class."""


def build_objectives(sections: Mapping[str, object], teacher: Teacher, student: Backbone) -> nn.ModuleDict:
    """Build the objectives whose weight is not 0.

    Args:
        sections: Name of each objective → its section in a YAML.
        teacher: The teacher.
        student: The student, to which an objective may add an alignment, a linear map of its embeddings.
    """
    built = nn.ModuleDict()
    for name, section in sections.items():
        with errors_of(f"objectives.{name}"):
            options = OBJECTIVES[name].Options.model_validate(section)
            if options.weight:
                built[name] = OBJECTIVES[name](options, teacher, student)
    return built
