"""Objectives: what a student regresses of a teacher.

Shapes: B inputs, T tokens, D channels of the teacher, d of a student of another width, L layers.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from d2v_composer.models.attention import fsdp_unit, init_linear_layers, linear_weights
from d2v_composer.models.features import Features
from d2v_composer.models.layer_mean import LayerMean
from d2v_composer.models.names import Prediction
from d2v_composer.models.sizes import check_choice
from d2v_composer.models.student import Student
from d2v_composer.models.targets import Regression, regression_loss
from d2v_composer.models.teacher import Teacher


class Objective(nn.Module, ABC):
    """A term of the loss: the distance of a student's prediction from a teacher's target.

    Args:
        teacher: Frozen. Objectives of one teacher run it once.
        head: From the student's width to the target's, for this term alone: checkpoints have it, exported files do not.
        weight: Of the term.

    Attributes:
        needs_output: The prediction depends on the student's output, and not on its FFN outputs alone.
    """

    _fsdp_wrap = False
    needs_output: bool

    def __init__(self, teacher: Teacher, head: nn.Module, weight: float = 1.0) -> None:
        super().__init__()
        self.teacher = teacher
        self.head = fsdp_unit(head)
        self.weight = weight

    @abstractmethod
    def target(self, features: Features) -> Tensor:
        """Compute the target from the teacher's features."""

    @abstractmethod
    def regression(self, features: Features, target: Tensor) -> Regression:
        """Compute the prediction from the student's features, with gradient."""

    @abstractmethod
    def loss(self, regression: Regression) -> Tensor:
        """Return the distance, a scalar."""

    @abstractmethod
    def forward_macs(self, num_tokens: int) -> int:
        """Return the multiply-accumulates of the head for one input."""


class LayerRegression(Objective):
    """Regress the mean of the teacher's layers, token by token.

    Args:
        teacher: Frozen.
        student: What regresses it; a head follows each of its layers if its width is another.
        layer_mean: Target and prediction.
        prediction: ``layer_mean``: of the student's FFN outputs, like the target; ``last_block``: its output.
        weight: Of the term.

    Raises:
        ValueError: An option's value is unknown, or does not fit the teacher.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: Student,
        layer_mean: LayerMean,
        prediction: Prediction = "layer_mean",
        weight: float = 1.0,
    ) -> None:
        check_choice("prediction", prediction, Prediction)
        if layer_mean.extra_tokens == "only" and not teacher.num_extra_tokens:
            raise ValueError("extra_tokens: 'only' needs extra tokens, and this teacher has none")
        widths = student.embed_dim, teacher.embed_dim
        head = nn.Identity() if widths[0] == widths[1] else init_linear_layers(nn.Linear(*widths))
        super().__init__(teacher, head, weight)
        top_k = layer_mean.average_top_k_layers or teacher.layer_mean.average_top_k_layers
        self.layer_mean = layer_mean.changed(average_top_k_layers=top_k)
        self.needs_output = prediction == "last_block"
        self.num_predicted = 1 if self.needs_output else student.config.depth

    def target(self, features: Features) -> Tensor:
        return self.layer_mean.target(features)

    def predict(self, features: Features) -> Tensor:
        """Compute the prediction of all tokens, (B, T, D)."""
        if self.needs_output:
            return self.head(features.output)
        num_dropped = self.layer_mean.regressed(features).start  # the target's statistics
        return self.layer_mean.average(map(self.head, features.layers()), features, num_dropped)

    def regression(self, features: Features, target: Tensor) -> Regression:
        prediction, regressed = self.predict(features), self.layer_mean.regressed(features)
        has_cls_loss = self.layer_mean.extra_tokens == "drop" and features.has_cls_token
        mask = None if features.padding_mask is None else features.padding_mask[:, regressed]
        return Regression(prediction[:, regressed], target, prediction[:, 0] if has_cls_loss else None, mask)

    def loss(self, regression: Regression) -> Tensor:
        return regression_loss(regression)

    def forward_macs(self, num_tokens: int) -> int:
        return self.num_predicted * num_tokens * linear_weights(self.head)
