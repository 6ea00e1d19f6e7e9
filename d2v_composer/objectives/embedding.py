"""Regress the teacher's own image embedding, ``projected_cls``: the loss is 1 - cosine similarity.

Shapes: B inputs, P channels of the embedding.
"""

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from d2v_composer.models.features import Features
from d2v_composer.objectives.objective import Objective, Regression, Term, Weight

# Least length of the predictions: they may point away from their targets.
LEAST_LENGTH = 1e-3


class EmbeddingRegression(Objective):
    """Regress the embedding's direction; the loss leaves its length free."""

    class Options(Term):
        weight: Weight = 0.0
        """Weight of this term, 1 minus the cosine similarity of ``projected_cls`` to the teacher's own image embedding;
        0: no such term. The term keeps a student in the space of its teacher's text tower."""

    needs_projection = True

    def target(self, features: Features) -> Tensor:
        return normalize(features.projected)

    def regression(self, features: Features, target: Tensor) -> Regression:
        """Return unit targets, and predictions that all have the length which fits best; the loss ignores length."""
        prediction = self.target(features)
        length = (prediction * target).sum(dim=1).mean().clamp(min=LEAST_LENGTH)
        return Regression(length.detach() * prediction, target)

    def loss(self, regression: Regression) -> Tensor:
        return 1 - cosine_similarity(regression.prediction, regression.target).mean()
