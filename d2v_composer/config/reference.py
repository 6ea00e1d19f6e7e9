"""Fields of YAMLs and commands that name a model, and the function that loads the model."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainValidator

from d2v_composer.config.resume import FIXED
from d2v_composer.config.types import AddressText, PathText, Whole, read_image_size
from d2v_composer.models.names import TIMM_PREFIX, Pooling, Representation, Weights
from d2v_composer.models.provenance import Record
from d2v_composer.system.addresses import hide_secrets
from d2v_composer.system.errors import InputError

if TYPE_CHECKING:
    from d2v_composer.checkpoints.load import Models


ImageSizeText = Annotated[int | str, PlainValidator(read_image_size)]


class TimmSizes(BaseModel):
    """Size of a model's shared encoder, and size of the model's images."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    first_blocks: Annotated[Whole | None, FIXED] = None
    """Number of the model's first blocks that are part of the shared encoder, which a student takes from its teacher.
    null: for a timm model, a sixth of its blocks, rounded; for a data2vec 2.0 model, the number in its file."""
    image_size: Annotated[ImageSizeText | None, FIXED] = None
    """Size of a timm model's images: pixels per side, or HEIGHTxWIDTH; null: the model's own size."""


class ModelReference(TimmSizes):
    """A trained model, and which of its embeddings to use."""

    model: PathText
    """timm/NAME, or the path or address (https://, s3://, …) of a data2vec 2.0 or EAT teacher, a training
    checkpoint or an exported student."""
    checkpoint: AddressText | None = None
    """Path or address of a timm model's weights, a .safetensors or PyTorch file; null: timm's pretrained weights, from
    the Hugging Face hub."""
    weights: Weights = "model"
    """Weights to take from a data2vec 2.0 teacher's file: ``model``, as trained, or ``ema``, their moving average."""
    teacher: PathText | None = None
    """Path or address of the student's teacher; null: for a distillation's checkpoint, the distillation's teacher;
    for other students, no teacher."""
    pooling: Pooling | None = None
    """Pooling of the features that are used instead of the model's embedding: ``cls``, ``mean`` of all tokens, or
    ``mean_patches``."""
    representation: Representation | None = None
    """Features that are pooled and used instead of the model's embedding: ``output`` of the last block, or
    ``layer_mean``, the mean of the blocks' normalized FFN outputs."""

    def describe(self) -> Record:
        """Return the fields that are not ``None``, with local paths made absolute and secrets hidden."""
        fields = {name: getattr(self, name) for name in ModelReference.model_fields}
        files = {name: os.path.abspath(fields[name]) for name in ("model", "checkpoint", "teacher") if fields[name]}
        fields |= {name: path for name, path in files.items() if os.path.exists(path)}
        return hide_secrets({name: value for name, value in fields.items() if value is not None})

    def load(self) -> "Models":
        """Load the model and its teacher; see :func:`load_any`."""
        return load_any(self.model, self.checkpoint, self.weights, self.teacher, self.first_blocks, self.image_size)


def load_any(
    model: str | Path,
    checkpoint: str | None = None,
    weights: Weights = "model",
    teacher: str | None = None,
    first_blocks: int | None = None,
    image_size: int | str | None = None,
) -> "Models":
    """Load a model and its teacher; the arguments are the fields of :class:`ModelReference`.

    Returns:
        The student, and its teacher or ``None`` if the teacher is not known; if the model is a teacher, this teacher
        twice.
    """
    from d2v_composer.checkpoints.load import load_models, load_teacher  # torch takes seconds to import
    from d2v_composer.models.teacher import Teacher

    path = str(model)
    sizes: Any = {"first_blocks": first_blocks, "image_size": image_size}
    if path.startswith(TIMM_PREFIX) and not Path(path).exists():
        loaded = its_teacher = load_teacher(checkpoint, weights, model=path, **sizes)
    elif given := [name for name, value in {"checkpoint": checkpoint, **sizes}.items() if value is not None]:
        raise InputError(f"{' and '.join(given)} can be set only if the model is timm/NAME; the model is {path}")
    else:
        loaded, its_teacher = load_models(path, weights, teacher)
    if isinstance(loaded, Teacher):
        if teacher is not None:
            raise InputError(f"teacher: must not be set, because {path} is not a student; got {teacher}")
    elif weights != "model":  # the student's record says which its teacher has
        raise InputError(f"weights: {path} is a student, which has no {weights} weights; set weights to 'model'")
    return loaded, its_teacher
