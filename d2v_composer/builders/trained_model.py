"""Load the model that an evaluation or a fine-tuning begins with."""

from d2v_composer.checkpoints.load import TimmWeights, load_any
from d2v_composer.config.schema import ModelConfig
from d2v_composer.models.student import Student
from d2v_composer.models.teacher import Teacher

__all__ = ["load_trained_model"]


def load_trained_model(config: ModelConfig) -> tuple[Student | None, Teacher | None]:
    """Load a student, and its teacher if known; or a teacher alone.

    Raises:
        InputError: A file cannot be used.
    """
    timm_weights = TimmWeights(config.checkpoint, config.first_blocks, config.image_size)
    return load_any(config.model, config.weights, config.teacher, "teacher=PATH", timm_weights)
