"""The model that a user names: its fields in a YAML, its flags on a command line, and what it loads."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, PlainValidator

from d2v_composer.config.types import AddressText, PathText, Whole, read_image_size
from d2v_composer.models.names import Pooling, Representation, Weights

if TYPE_CHECKING:
    from d2v_composer.checkpoints.load import Models


class TimmSizes(BaseModel):
    """Sizes of a timm model."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    first_blocks: Whole | None = None
    """Blocks in the shared encoder; null: a sixth of a timm model's blocks; in data2vec2, its modality encoder's."""
    image_size: Annotated[int | str, PlainValidator(read_image_size)] | None = None
    """timm: pixels per side, or HEIGHTxWIDTH; null: the model's own."""


class ModelReference(TimmSizes):
    """A trained model, and which of its embeddings to use."""

    model: PathText
    """A data2vec 2.0 teacher's file, a training checkpoint or an exported student: a path, https://, s3://, …; or
    timm/NAME."""
    checkpoint: AddressText | None = None
    """Weights of a timm model, a .safetensors or PyTorch file; null: timm's own, from the Hugging Face hub."""
    weights: Weights = "model"
    """Weights to take from a data2vec2 teacher's file: ``model``, as trained, or ``ema``, their moving average."""
    teacher: PathText | None = None
    """Path of the student's teacher; null: the path in a training checkpoint, or none for an exported student."""
    pooling: Pooling | None = None
    """Pooling of the primary embedding: ``cls``, ``mean`` or ``mean_patches``; null: as in the model's run, else
    ``cls``."""
    representation: Representation | None = None
    """Representation of the primary embedding: ``output``, ``layer_mean`` or ``projected``; null: as in the model's
    run, else ``output``."""

    @classmethod
    def add_flags(cls, add: Callable[..., Any]) -> None:
        """Add a flag for each field except the model, with an ``argparse`` parser's ``add_argument``."""
        for name, field in cls.model_fields.items():
            kinds = (field.annotation, *get_args(field.annotation))
            choices = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), None)
            about = (field.description or "").replace("null: ", "default: ").replace("``", "").rstrip(".")
            if not field.is_required():
                kind = int if name == "first_blocks" else str
                add(f"--{name.replace('_', '-')}", type=kind, choices=choices, default=field.default, help=about)

    def load(self, projected: bool = False) -> "Models":
        """Load the model, and its teacher; see :func:`~d2v_composer.checkpoints.load.load_any`.

        ``projected``: a teacher with its image embedding, even if ``representation`` names another.
        """
        from d2v_composer.checkpoints.load import load_any  # torch takes seconds to import

        options = {name: getattr(self, name) for name in ("checkpoint", "first_blocks", "image_size")}
        projected |= self.representation == "projected"
        return load_any(self.model, self.weights, self.teacher, **options, projected=projected)
