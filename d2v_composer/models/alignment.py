"""Alignments: linear maps from a model's raw embeddings (pooled features) to the embedding that the model returns.

Shapes: B samples of a batch, N pairs, I channels of concatenated raw embeddings, P channels of the embedding, S ridge
strengths.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from d2v_composer.models.encoder import Freezable
from d2v_composer.models.names import EMBEDDING, MadeBy

# Ridge strengths that are tried, as multiples of the mean eigenvalue of the inputs' centered XᵀX.
STRENGTHS = [10.0**power for power in range(-8, 2)]
# Every tenth pair is held out, to choose the strength and to measure R².
HELD_OUT = 10
MIN_PAIRS = 2 * HELD_OUT


MADE_BY: dict[MadeBy, str] = {
    "teacher": "the teacher's own",
    "alignment": "estimated by an alignment",
    "training": "estimated by a trained alignment",
    "raw": "the student's own, without an alignment",
}


class EmbeddingInfo(NamedTuple):
    """Description of a model's embedding."""

    of: str
    """Name of this embedding or, for an estimate, of the estimated embedding."""
    made_by: MadeBy
    width: int
    """Number of channels, P."""
    fingerprint: str
    """Hash of the alignment; '' without an alignment."""
    space: str = ""
    """Identifier of the space in which the embedding lies; '' if unknown."""

    def is_in_space_of(self, other: "EmbeddingInfo") -> bool:
        """Return True if both embeddings are in the same known space."""
        return self.space == other.space != ""

    def in_words(self, name: str) -> str:
        """Return the label of the embedding ``name`` in tables, such as "the teacher's output_cls"."""
        if name != EMBEDDING or self.of == EMBEDDING:
            return name
        return f"raw {self.of}" if self.made_by == "raw" else f"the teacher's {self.of}"

    def __str__(self) -> str:
        return f"{self.of}, {self.width} channels, {MADE_BY[self.made_by]}"


class Alignment(Freezable):
    """A float32 linear map from a model's concatenated raw embeddings to the model's embedding.

    The map is frozen unless ``made_by`` is ``training``.

    Args:
        inputs: Names of the raw embeddings to concatenate.
        weight: Matrix of the alignment, (P, I).
        bias: Bias of the alignment, (P,).
        of, made_by, space: See :class:`EmbeddingInfo`.
    """

    def __init__(
        self, inputs: Sequence[str], weight: Tensor, bias: Tensor, of: str, made_by: MadeBy, space: str = ""
    ) -> None:
        super().__init__()
        self.inputs, self.of, self.space = inputs, of, space
        self.made_by: MadeBy = made_by
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        if made_by != "training":
            self.freeze()

    @property
    def info(self) -> EmbeddingInfo:
        return EmbeddingInfo(self.of, self.made_by, len(self.bias), hash_tensors(self.state_dict()), self.space)

    def forward(self, embeddings: Mapping[str, Tensor]) -> Tensor:
        """Return the model's embedding, (B, P) float32, given the raw embeddings by name."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return linear(side_by_side(embeddings, self.inputs), self.weight, self.bias)


def hash_tensors(tensors: Mapping[str, Tensor], *about: object) -> str:
    """Return a SHA-256 hash of tensors' names, shapes and values as float32, and of the ``repr`` of ``about``."""
    digest = hashlib.sha256(repr(about).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()


def side_by_side(embeddings: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Return the embeddings in ``names``, concatenated in this order, (B, I) float32."""
    return torch.cat([embeddings[name].float() for name in names], dim=1)


class Fit(NamedTuple):
    """A fitted linear map."""

    weight: Tensor
    """Matrix, (P, I) float32."""
    bias: Tensor
    """Bias, (P,) float32."""
    statistics: dict[str, float]
    """``pairs``: number of pairs; ``ridge``: factor of |W|², see :meth:`Moments.fit`; ``r2``: share of the
    held-out targets' variance that a map fitted to the remaining pairs explains."""


class Moments:
    """Sums of products over pairs of inputs and targets, in float64, from which :meth:`fit` computes a linear map.

    Args:
        pairs: Batches of inputs and targets for :meth:`add`.
    """

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]] = ()) -> None:
        self.sums: list[Tensor] = []
        self.count = 0
        for inputs, targets in pairs:
            self.add(inputs, targets)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add pairs of inputs, (N, I), and targets, (N, P). Every tenth pair, counted over all calls, is held out."""
        rows = torch.cat([inputs.new_ones(len(inputs), 1), inputs, targets], dim=1).double()
        is_held_out = torch.arange(self.count, self.count + len(rows), device=rows.device) % HELD_OUT == HELD_OUT - 1
        sums = [part.T @ part for part in (rows[~is_held_out], rows[is_held_out])]
        self.sums = [old + new for old, new in zip(self.sums, sums, strict=True)] if self.count else sums
        self.count += len(rows)
        self.inputs, self.targets = slice(inputs.shape[1]), slice(inputs.shape[1], None)

    def fit(self, whole: bool = True) -> Fit:
        """Fit a ridge regression with the strength that has the least error on the held-out pairs.

        Args:
            whole: Fit the returned map to all pairs; if false, leave out the held-out pairs.

        Source: Hoerl and Kennard 1970, Technometrics 12(1). For inputs X and targets Y, the map minimizes
        |Y - XW - b|² + ridge |W|².
        """
        fitted, held_out = (sums.cpu() for sums in self.sums)
        is_finite = bool((fitted + held_out).isfinite().all())
        if self.count < MIN_PAIRS or not is_finite:
            found = f"{self.count} pairs" + ("" if is_finite else ", not all finite")
            raise ValueError(f"expected at least {MIN_PAIRS} pairs of finite embeddings, got {found}")
        inputs, targets = self.inputs, self.targets
        means, values_I, basis_II, products_IP = self._decomposed(fitted)
        scatter = scatter_about(held_out, means)
        # The squared error of the alignment is a quadratic function of how much each eigenvector is shrunk.
        linear_I = (products_IP * (basis_II.T @ scatter[inputs, targets])).sum(dim=1)
        square_II = (basis_II.T @ scatter[inputs, inputs] @ basis_II) * (products_IP @ products_IP.T)
        total = scatter[targets, targets].trace()
        shrink_SI = torch.stack([1 / (values_I + strength * values_I.mean()) for strength in STRENGTHS])
        errors_S = total - 2 * shrink_SI @ linear_I + (shrink_SI @ square_II * shrink_SI).sum(dim=1)
        if total <= 1e-12 * held_out[1:, 1:][targets, targets].trace() or not errors_S.isfinite().all():
            raise ValueError(
                f"expected embeddings that differ from pair to pair, but they are alike in all {self.count} pairs"
            )
        if whole:
            means, values_I, basis_II, products_IP = self._decomposed(fitted + held_out)
        ridge = STRENGTHS[int(errors_S.argmin())] * values_I.mean()
        weight_IP = basis_II @ (products_IP / (values_I + ridge)[:, None])
        bias_P = means[targets] - means[inputs] @ weight_IP
        statistics = {"pairs": self.count, "ridge": float(ridge), "r2": 1 - float(errors_S.min() / total)}
        return Fit(weight_IP.T.float().contiguous(), bias_P.float(), statistics)

    def _decomposed(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the means, (I + P,); the eigenvalues, (I,), and eigenvectors, (I, I), of the centered XᵀX; and the
        centered XᵀY in the basis of the eigenvectors, (I, P)."""
        means = sums[0, 1:] / sums[0, 0]
        scatter = scatter_about(sums, means)
        values_I, basis_II = torch.linalg.eigh(scatter[self.inputs, self.inputs])
        return means, values_I.clamp(min=0), basis_II, basis_II.T @ scatter[self.inputs, self.targets]


def scatter_about(sums: Tensor, means: Tensor) -> Tensor:
    """Return the sums of products of all channels after subtracting ``means``, (I + P, I + P).

    ``sums`` has the products before the subtraction, with a leading channel of ones, (1 + I + P, 1 + I + P).
    """
    count, totals = sums[0, 0], sums[0, 1:]
    crossed = torch.outer(means, totals)
    return sums[1:, 1:] - crossed - crossed.T + count * torch.outer(means, means)
