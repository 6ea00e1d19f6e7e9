"""The base of objectives, which are terms of the loss.

Shapes: B inputs, T tokens, N patches or frames, D channels of the target.
"""

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, NamedTuple

from pydantic import BaseModel, Field
from torch import Tensor, nn

from d2v_composer.models.backbone import Backbone
from d2v_composer.models.configs import STRICT
from d2v_composer.models.features import Features
from d2v_composer.models.teacher import Teacher

Weight = Annotated[float, Field(ge=0)]


class Term(BaseModel):
    """Fields of an objective's section in a YAML."""

    model_config = STRICT

    weight: Weight = 0.0
    """Weight of the term in the loss; 0 leaves the term out."""


class Regression(NamedTuple):
    """A prediction and its target."""

    prediction: Tensor
    """Prediction of all tokens, (B, T, D), of patches or frames alone, (B, N, D), or of an embedding, (B, D)."""
    target: Tensor
    """Target, of the same shape as ``prediction``, without gradient."""
    cls_prediction: Tensor | None = None
    """Prediction of CLS, (B, D), if the loss compares it with the target's mean over the tokens; else ``None``."""
    padding_mask: Tensor | None = None
    """Mask of the predicted tokens, (B, T) or (B, N) bool, true for padding; ``None`` if no token is padding."""


class Objective(nn.Module, ABC):
    """A term of the loss: the distance of a student's prediction from a teacher's target.

    :meth:`target` and :meth:`regression` compute in the run's precision, :meth:`loss` without autocast.

    Args:
        options: The term's section in a YAML.

    Attributes:
        Options: Fields of the section.
        head: A module that trains with the student, and is not part of exported students.
    """

    Options: ClassVar[type[Term]] = Term
    head: nn.Module

    def __init__(self, options: Term, teacher: Teacher, student: Backbone) -> None:
        super().__init__()
        self.weight: float = options.weight
        self.head = nn.Identity()

    @abstractmethod
    def target(self, features: Features) -> Tensor:
        """Compute the target of each input, (B, …), from the teacher's features.

        The target of an input must not depend on the other inputs.
        """

    @abstractmethod
    def regression(self, features: Features, target: Tensor) -> Regression:
        """Compute the prediction from the student's features, with gradient."""

    @abstractmethod
    def loss(self, regression: Regression) -> Tensor:
        """Return the loss of a prediction against its target, a scalar that is finite even for one input."""
