"""An objective: regress the mean of the teacher's layers, token by token.

Shapes: B inputs, T tokens, D channels of the teacher, H rows and W columns of the student's grid.
"""

from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, cat, nn
from torch.nn.functional import interpolate, mse_loss

from d2v_composer.models.attention import init_linear_layers
from d2v_composer.models.backbone import Backbone, Transformer
from d2v_composer.models.configs import TargetOptions
from d2v_composer.models.features import Features, mean_over_time
from d2v_composer.models.names import Prediction
from d2v_composer.models.targets import target_of
from d2v_composer.models.teacher import Teacher
from d2v_composer.objectives.objective import Objective, Regression, Term, Weight

CLS_LOSS_WEIGHT = 0.01  # data2vec 2.0's `cls_loss` of the image models


class LayerRegression(Objective):
    """Predict the target, the mean of the teacher's normalized layers, for each token.

    For a timm student, the head is a :class:`GridHead`. For other students, the head is a linear layer if the teacher
    has another number of channels.

    Raises:
        ValueError: ``cls_weight`` is set, but CLS is not among the tokens that the student regresses.
    """

    class Options(TargetOptions, Term):
        prediction: Prediction = "layer_mean"
        """Prediction of the target. ``layer_mean``: the mean of the normalized FFN outputs of the student's blocks.
        ``last_block``: the output of the student's last block. A timm student predicts the target with its head's
        output, which is normalized for ``layer_mean`` only."""
        cls_weight: Annotated[float, Field(ge=0, le=1)] | None = None
        """Share of CLS in the loss, from 0 to 1; null: the same share as every other token."""
        weight: Weight = 1.0
        """Weight of the term in the loss; 0 leaves the term out."""

    def __init__(self, options: Options, teacher: Teacher, student: Backbone) -> None:
        super().__init__(options, teacher, student)
        has_cls, widths = teacher.has_cls_token, (student.embed_dim, teacher.embed_dim)
        self.is_grid = not isinstance(student, Transformer)
        if options.cls_weight is not None and (options.extra_tokens != "regress" or not has_cls):
            raise ValueError("cls_weight: allowed only with extra_tokens 'regress' and a teacher that has a CLS token")
        if self.is_grid:
            self.head = GridHead(student.encoder, teacher)
        elif widths[0] != widths[1]:
            self.head = nn.Linear(*widths)
        init_linear_layers(self.head)
        self.options, self.top_k = options, options.average_top_k_layers or teacher.config.average_top_k_layers
        self.layer_mean = student.layer_mean.changed(options.normalization, options.final_layer_norm)

    def target(self, features: Features) -> Tensor:
        features = features.without_registers() if self.is_grid else features
        return target_of(features, self.options, self.top_k, self.layer_mean)

    def regression(self, features: Features, target: Tensor) -> Regression:
        features, project = (self.head(features), nn.Identity()) if self.is_grid else (features, self.head)
        num_dropped = self.options.num_dropped(features.num_extra_tokens)
        if self.options.prediction == "last_block":
            prediction = project(features.output)
        else:  # statistics skip the tokens that the target's skip
            prediction = self.layer_mean(map(project, features.layers()), features, num_dropped)
        has_cls_loss = self.options.extra_tokens == "drop" and features.has_cls_token
        mask = None if features.padding_mask is None else features.padding_mask[:, num_dropped:]
        return Regression(prediction[:, num_dropped:], target, prediction[:, 0] if has_cls_loss else None, mask)

    def loss(self, regression: Regression) -> Tensor:
        return regression_loss(regression, self.options.cls_weight)


class GridHead(nn.Module):
    """Predict a teacher's tokens from a timm student's features: CLS from the pooled feature, patches from the grid.

    The grid is resized to the teacher's grid with bilinear interpolation.

    Args:
        encoder: The student's encoder, a :class:`~d2v_composer.models.timm_network.TimmBackbone`.
    """

    def __init__(self, encoder: Any, teacher: Teacher) -> None:
        super().__init__()
        self.sizes = encoder.grid_size, teacher.encoder.config.grid_size
        self.patches = nn.Linear(encoder.num_channels, teacher.embed_dim)
        self.cls = nn.Linear(encoder.num_pooled, teacher.embed_dim) if teacher.has_cls_token else None

    def forward(self, features: Features) -> Features:
        """Return features with one layer, (B, T, D): CLS, if the teacher has CLS, and the patches."""
        grid, wanted = self.sizes
        x_BTD = self.patches(features.output)
        if grid != wanted:  # a linear layer of each cell and bilinear weights, which add up to 1, commute
            grid_BDHW = x_BTD.transpose(1, 2).unflatten(2, grid)
            x_BTD = interpolate(grid_BDHW.float(), wanted, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
        if self.cls is not None:
            x_BTD = cat([self.cls(features.pooled)[:, None].to(x_BTD.dtype), x_BTD], dim=1)
        return Features.of_layer(x_BTD, int(self.cls is not None), self.cls is not None)


def regression_loss(regression: Regression, cls_weight: float | None = None) -> Tensor:
    """Return the mean squared error of the tokens, plus 0.01 × the error of ``cls_prediction`` if given: a scalar.

    Padding does not count, and each input has the same weight.

    Args:
        cls_weight: The share of the first token, CLS, in the loss; default: the same share as every other token.
    """
    prediction, target, mask = regression.prediction.float(), regression.target, regression.padding_mask
    if cls_weight is None and mask is None:
        total = mse_loss(prediction, target)
    else:
        error_BT1 = (prediction - target).square().mean(dim=-1, keepdim=True)
        total = mean_over_time(error_BT1, cls_weight is not None, mask).mean()
        if cls_weight is not None:
            total = cls_weight * error_BT1[:, 0].mean() + (1 - cls_weight) * total
    if regression.cls_prediction is None:
        return total
    mean_target_BD = mean_over_time(target, padding_mask=mask)[:, 0]
    return total + CLS_LOSS_WEIGHT * mse_loss(regression.cls_prediction.float(), mean_target_BD)
