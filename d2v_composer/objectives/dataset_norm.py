"""Normalize layers by a fixed mean and deviation of each channel, measured once on the data.

Shapes: B inputs, T tokens, D channels, L layers.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from d2v_composer.models.targets import NORM_EPS, average, mean_over_time


class DatasetNorm(nn.Module):
    """Subtract a fixed mean from each channel of each layer, and divide by a fixed deviation, both over a data set.

    Unlike InstanceNorm, this keeps what the tokens of an input share, and unlike LayerNorm how far a token is from the
    usual one. UNIC (arXiv:2408.05088), PHI-S (arXiv:2410.01680) and EUPE (arXiv:2603.22387) standardize the features of
    their teachers.

    Args:
        num_layers: L.
        dim: D.

    Attributes:
        moments: (L, 3, D) float64: the number of inputs, and over them the sums of each one's mean value and mean
            square. Checkpoints have them. While they are 0, all is NaN.
        measures: Add what passes through to ``moments``.
    """

    moments: Tensor
    measures = False

    def __init__(self, num_layers: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("moments", torch.zeros(num_layers, 3, dim, dtype=torch.float64))

    def forward(
        self, layers: Iterable[Tensor], num_extra_tokens: int, _: str, final_layer_norm: bool, mask: Tensor | None
    ) -> Tensor:
        """Compute :func:`~d2v_composer.models.targets.norm_mean`, whose arguments these are, with this normalization.

        The first tokens and padding do not count in the moments.
        """

        def normalize(layer_BTD: Tensor, moments_3D: Tensor) -> Tensor:
            if self.measures:
                powers = (layer_BTD.double() ** power for power in range(3))
                means_3B1D = [mean_over_time(each, num_extra_tokens, mask) for each in powers]
                moments_3D += torch.stack(means_3B1D).sum(dim=(1, 2))
            mean_D, square_D = moments_3D[1:] / moments_3D[0]
            scale_D = (square_D - mean_D.square() + NORM_EPS).rsqrt()
            return (layer_BTD - mean_D.float()) * scale_D.float()

        return average(map(normalize, layers, self.moments), final_layer_norm)
