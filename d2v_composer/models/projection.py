"""Compute a model's embedding ``projected_cls`` from its output: pool it, then map it.

Shapes: B inputs, T tokens, D channels, P of the embedding.
"""

from torch import Tensor, nn

from d2v_composer.models.attention import linear_weights
from d2v_composer.models.encoder import Frozen
from d2v_composer.models.features import Features
from d2v_composer.models.names import Pooling


class Projection(Frozen):
    """Pool a model's output: CLS, or the mean of patches or frames; then map it.

    Args:
        pooling: Of the output.
        linear: D → P; default the identity.

    Attributes:
        num_outputs: P; 0: D, as nothing follows the pooling.
        norm: A student's output passes it first: its teacher's final norm.
    """

    def __init__(self, pooling: Pooling = "cls", linear: nn.Linear | None = None) -> None:
        super().__init__()
        self.pooling = pooling
        self.linear = nn.Identity() if linear is None else linear
        self.num_outputs = 0 if linear is None else linear.out_features
        self.norm: nn.Module = nn.Identity()

    def forward(self, features: Features, output_BTD: Tensor) -> Tensor:
        """Return the embeddings, (B, P)."""
        return self.linear(features.poolings(output_BTD)[self.pooling])

    def forward_macs(self, num_tokens: int) -> int:
        """Return the multiply-accumulates for one input."""
        return linear_weights(self)
