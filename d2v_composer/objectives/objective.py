"""The base of objectives: terms of the loss, each with its section in a YAML.

Shapes: B inputs, T tokens, E extra tokens, N patches or frames, D channels of the teacher, d of a narrower student.
"""

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, Field
from torch import Tensor, nn

from d2v_composer.models.backbone import Backbone
from d2v_composer.models.configs import STRICT
from d2v_composer.models.features import Features
from d2v_composer.models.teacher import Teacher

Weight = Annotated[float, Field(ge=0)]


class Term(BaseModel):
    """Fields of an objective's section in a YAML. Runs that began before a field existed resume with its default."""

    model_config = STRICT

    weight: Weight = 0.0
    """Weight of the term in the loss; 0 leaves the term out."""


class Regression(NamedTuple):
    """An objective's prediction and its target."""

    prediction: Tensor
    """(B, T, D); (B, N, D) without the extra tokens; for an embedding, (B, D)."""
    target: Tensor
    """Same shape as ``prediction``, without gradient."""
    cls_prediction: Tensor | None = None
    """Prediction of CLS, (B, D), if the loss compares it with the target's mean over the tokens; else ``None``."""
    padding_mask: Tensor | None = None
    """(B, T) bool: true for tokens that the loss leaves out."""


class Outputs(NamedTuple):
    """Result of the model's ``forward`` for a microbatch."""

    regressions: dict[str, Regression]
    """Name of each objective → its regression."""
    kept_targets: Tensor | None = None
    """Targets of all objectives, flattened and side by side, (B, W) float16. A later batch with them needs no teacher.
    ``None`` if the batch already had targets, or if the model keeps none."""


class Objective(nn.Module, ABC):
    """A term of the loss: the distance of a student's prediction from a teacher's target.

    :meth:`target` and :meth:`regression` compute in the run's precision, :meth:`loss` without autocast.

    Args:
        options: The term's section in a YAML.
        teacher: The frozen teacher, which runs once for all objectives.
        student: The student, which trains.

    Attributes:
        Options: Fields of the section.
        head: Maps the student's width to the target's, for this term alone; stored in checkpoints, but not in exported
            files.
        compares: ``inputs`` if the loss is a mean over inputs, so that its mean over microbatches and ranks is the loss
            of the batch. ``microbatch`` if the loss depends on which inputs are together; then a resume must keep the
            size of a microbatch and the number of ranks.
    """

    Options: ClassVar[type[Term]] = Term
    compares: ClassVar[Literal["inputs", "microbatch"]] = "inputs"
    head: nn.Module

    def __init__(self, options: Term, teacher: Teacher, student: Backbone) -> None:
        super().__init__()
        self.weight: float = options.weight
        self.head = nn.Identity()

    @abstractmethod
    def target(self, features: Features) -> Tensor:
        """Compute the target of each input from the teacher's features, (B, …).

        Whatever depends on the other inputs of a batch belongs in :meth:`regression`: a target may be kept and used
        with other inputs.
        """

    @abstractmethod
    def regression(self, features: Features, target: Tensor) -> Regression:
        """Compute the prediction from the student's features, with gradient."""

    @abstractmethod
    def loss(self, regression: Regression) -> Tensor:
        """Return the loss of a prediction against its target, a scalar, which is finite for a single input, too."""
