"""The terms of the loss: what a student regresses, and how far it is off.

Shapes: B inputs, T tokens, D channels of the teacher, d of a student of another width, L layers.
"""

from abc import ABC, abstractmethod
from typing import Any, cast

from torch import Tensor, cat, nn
from torch.nn.functional import cosine_similarity, interpolate, normalize

from d2v_composer.models.attention import init_linear_layers, linear_weights
from d2v_composer.models.backbone import Backbone
from d2v_composer.models.configs import check_choice
from d2v_composer.models.dataset_norm import DatasetNorm
from d2v_composer.models.features import Features
from d2v_composer.models.layer_mean import LayerMean
from d2v_composer.models.names import Prediction, TokenLoss
from d2v_composer.models.targets import Regression, regression_loss
from d2v_composer.models.teacher import Teacher

# Of predictions that point away from their targets.
LEAST_LENGTH = 1e-3


class Objective(nn.Module, ABC):
    """A term of the loss: the distance of a student's prediction from a teacher's target.

    Args:
        teacher: Frozen. Objectives of one teacher run it once.
        head: From the student's width to the target's, for this term alone: checkpoints have it, exported files do not.
        weight: Of the term.

    Attributes:
        needs_output: The prediction depends on the student's output, and not on its FFN outputs alone.
        needs_pooled: It depends on the student's own pooled feature.
    """

    needs_output = needs_pooled = False

    def __init__(self, teacher: Teacher, head: nn.Module, weight: float = 1.0) -> None:
        super().__init__()
        self.teacher = teacher
        self.head = head
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

    def forward_macs(self, num_tokens: int) -> int:
        """Return the multiply-accumulates of the head for one input; by default, there is no head."""
        return 0


class LayerRegression(Objective):
    """Regress the mean of the teacher's layers, token by token.

    Args:
        teacher: Frozen.
        student: What regresses it; a head follows each of its layers if its width is another.
        layer_mean: Target and prediction.
        prediction: ``layer_mean``: of the student's FFN outputs, like the target; ``last_block``: its output.
        weight: Of the term.
        loss: Distance of a token's prediction from its target.
        cls_weight: The share of CLS in the term; default as of any other token.
        dataset_norm: Normalize the target's layers by fixed numbers instead, which must be measured first.

    Raises:
        ValueError: An option's value is unknown, or does not fit the teacher.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: Backbone,
        layer_mean: LayerMean,
        prediction: Prediction = "layer_mean",
        weight: float = 1.0,
        loss: TokenLoss = "mse",
        cls_weight: float | None = None,
        dataset_norm: bool = False,
    ) -> None:
        check_choice("prediction", prediction, Prediction)
        check_choice("loss", loss, TokenLoss)
        if cls_weight is not None and (layer_mean.extra_tokens != "regress" or not teacher.has_cls_token):
            raise ValueError("cls_weight: allowed only with extra_tokens 'regress' and a teacher that has CLS")
        if layer_mean.extra_tokens == "only" and not teacher.num_extra_tokens:
            raise ValueError("extra_tokens: 'only' needs extra tokens, and this teacher has none")
        super().__init__(teacher, self.build_head(teacher, student), weight)
        top_k = layer_mean.average_top_k_layers or teacher.config.average_top_k_layers
        self.layer_mean = layer_mean.changed(average_top_k_layers=top_k)
        self.dataset_norm = DatasetNorm(top_k, teacher.embed_dim) if dataset_norm else None
        self.prediction: Prediction = prediction
        self.token_loss: TokenLoss = loss
        self.cls_weight = cls_weight
        self.needs_output = prediction == "last_block"
        self.num_predicted = 1 if self.needs_output else student.num_layers

    def build_head(self, teacher: Teacher, student: Backbone) -> nn.Module:
        """Build the layer that maps the student's width to the teacher's."""
        widths = student.embed_dim, teacher.embed_dim
        return nn.Identity() if widths[0] == widths[1] else init_linear_layers(nn.Linear(*widths))

    def target(self, features: Features) -> Tensor:
        return self.layer_mean.target(features, self.dataset_norm)

    def predict(self, features: Features) -> Tensor:
        """Compute the prediction of all tokens, (B, T, D)."""
        if self.prediction == "last_block":
            return self.project(features.output)
        num_dropped = self.layer_mean.regressed(features).start  # the target's statistics
        return self.layer_mean.average(map(self.project, features.layers()), features, num_dropped)

    def project(self, layer_BTd: Tensor) -> Tensor:
        """Project a layer of the student, (B, T, d), to the teacher's width, (B, T, D)."""
        return self.head(layer_BTd)

    def regression(self, features: Features, target: Tensor) -> Regression:
        prediction, regressed = self.predict(features), self.layer_mean.regressed(features)
        has_cls_loss = self.layer_mean.extra_tokens == "drop" and features.has_cls_token
        mask = None if features.padding_mask is None else features.padding_mask[:, regressed]
        return Regression(prediction[:, regressed], target, prediction[:, 0] if has_cls_loss else None, mask)

    def loss(self, regression: Regression) -> Tensor:
        return regression_loss(regression, self.token_loss, self.cls_weight)

    def forward_macs(self, num_tokens: int) -> int:
        return self.num_predicted * num_tokens * linear_weights(self.head)


class GridRegression(LayerRegression):
    """Regress the mean of the teacher's layers with a student that has a feature map of any size, and a pooled feature.

    Registers are left out of target and statistics, because the student has nothing like them.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.layer_mean.extra_tokens == "only" and not self.teacher.has_cls_token:
            raise ValueError("extra_tokens: 'only' needs CLS, and this teacher has none")
        self.needs_output, self.needs_pooled = True, self.teacher.has_cls_token

    def build_head(self, teacher: Teacher, student: Backbone) -> nn.Module:
        config = teacher.encoder.config
        return init_linear_layers(GridHead(student.encoder, teacher.embed_dim, config.grid_size, config.has_cls_token))

    def target(self, features: Features) -> Tensor:
        return super().target(features.without_registers())

    def project(self, layer_BTd: Tensor) -> Tensor:
        return layer_BTd  # already the teacher's

    def regression(self, features: Features, target: Tensor) -> Regression:
        x_BTD, has_cls_token = self.head(features.output, features.pooled), self.teacher.has_cls_token
        tokens = Features(lambda _: [(x_BTD, x_BTD)], 1, nn.Identity(), int(has_cls_token), has_cls_token)
        return super().regression(tokens, target)

    def forward_macs(self, num_tokens: int) -> int:
        return cast("GridHead", self.head).forward_macs()


class EmbeddingRegression(Objective):
    """Regress the teacher's own image embedding, ``projected_cls``: the loss is 1 - cosine similarity.

    Args:
        teacher: Frozen; it and the student have that embedding.
        student: What regresses it.
        weight: Of the term.
    """

    needs_pooled = True

    def __init__(self, teacher: Teacher, student: Backbone, weight: float = 1.0) -> None:
        super().__init__(teacher, nn.Identity(), weight)
        self.projects = teacher.project, student.project

    def target(self, features: Features) -> Tensor:
        return normalize(self.projects[0](features, features.output).float())

    def regression(self, features: Features, target: Tensor) -> Regression:
        """Return unit vectors, the predictions at the length that fits best: the loss leaves it free."""
        prediction = normalize(self.projects[1](features, features.output).float())
        length = (prediction * target).sum(dim=1).mean().clamp(min=LEAST_LENGTH)
        return Regression(length.detach() * prediction, target)

    def loss(self, regression: Regression) -> Tensor:
        return 1 - cosine_similarity(regression.prediction, regression.target).mean()


class GridHead(nn.Module):
    """Predict a teacher's tokens from a network's features: CLS from the pooled feature, patches from the grid.

    The grid is resized to the teacher's, bilinearly.

    Args:
        encoder: The network, a :class:`~d2v_composer.models.timm_network.TimmNetwork`.
        dim: D, the teacher's channels.
        grid_size: The teacher's grid.
        has_cls_token: The teacher has CLS.
    """

    def __init__(self, encoder: Any, dim: int, grid_size: tuple[int, int], has_cls_token: bool) -> None:
        super().__init__()
        self.sizes = encoder.grid_size, grid_size
        self.patches = nn.Linear(encoder.num_channels, dim)
        self.cls = nn.Linear(encoder.num_pooled, dim) if has_cls_token else None

    def forward(self, x_BNC: Tensor, pooled_BP: Tensor) -> Tensor:
        """Return (B, T, D): CLS, if there is one, and the patches."""
        own, wanted = self.sizes
        x_BND = self.patches(x_BNC)
        if own != wanted:  # a linear layer of each cell and bilinear weights, which add up to 1, commute
            grid_BDHW = x_BND.transpose(1, 2).unflatten(2, own)
            x_BND = interpolate(grid_BDHW.float(), wanted, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
        return x_BND if self.cls is None else cat([self.cls(pooled_BP)[:, None].to(x_BND.dtype), x_BND], dim=1)

    def forward_macs(self) -> int:
        """Return the multiply-accumulates for one image."""
        cells = self.sizes[0][0] * self.sizes[0][1]
        return cells * self.patches.weight.numel() + (0 if self.cls is None else self.cls.weight.numel())
