"""A linear probe: multinomial logistic regression on standardized embeddings.

The probe minimizes mean cross-entropy + strength / 2 · ‖W‖², where W are the weights without the bias. With three or
more classes, the same probe in scikit-learn is StandardScaler, followed by LogisticRegression with
C = 1 / (strength · N).

Shapes: N training samples, Q queries, D channels, C classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from d2v_composer.models.precision import precision_of

STRENGTHS = tuple(10.0**exponent for exponent in range(1, -8, -1))
"""L2 penalty strengths to choose from, strongest first."""
# The solver stops at this largest gradient, or before it where float32 cannot tell two losses apart.
TOLERANCE, TOLERANCE_OF_CHOICE = 1e-6, 1e-3
MAX_EVALUATIONS = 600


class LinearProbe(NamedTuple):
    """A fitted classifier of embeddings."""

    classes: Tensor
    """Labels of the classes in ascending order, (C,) int."""
    weight: Tensor
    """Weights for embeddings that are not standardized, (C, D) float64."""
    bias: Tensor
    """Bias of each class, (C,) float64."""
    strength: float
    """Strength of the L2 penalty on the weights for standardized embeddings."""
    converged: bool
    """True if the solver needed fewer than ``MAX_EVALUATIONS`` evaluations of the loss."""

    def predict(self, embeddings: Tensor) -> Tensor:
        """Return the predicted labels, (Q,), of embeddings, (Q, D)."""
        return self.classes[(embeddings.double() @ self.weight.T + self.bias).argmax(dim=1)]


def linear_probe_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, strength: float | None = None
) -> float:
    """Return the test accuracy, from 0 to 1, of a linear probe fitted to the train samples.

    Args:
        train: Train embeddings, (N, D).
        train_labels: Labels of the train samples, (N,) int.
        test: Test embeddings, (Q, D), Q ≥ 1.
        test_labels: Labels of the test samples, (Q,) int.
        strength: L2 penalty strength; default: chosen by :func:`fit_linear_probe`.

    Example:
        >>> labels = torch.arange(100) % 2
        >>> embeddings = torch.randn(100, 8) + 10 * labels[:, None]
        >>> linear_probe_accuracy(embeddings[:50], labels[:50], embeddings[50:], labels[50:])
        1.0
    """
    probe = fit_linear_probe(train, train_labels, strength)
    return (probe.predict(test) == test_labels.to(test.device)).double().mean().item()


def fit_linear_probe(train: Tensor, labels: Tensor, strength: float | None = None) -> LinearProbe:
    """Fit a linear probe by L-BFGS in float32.

    Args:
        train: Embeddings, (N, D), of any float dtype.
        labels: Labels of the embeddings, (N,) int.
        strength: L2 penalty strength; default: chosen from ``STRENGTHS`` by the accuracy on a random tenth of the
            samples, before the probe is fitted to all samples.
    """
    # A callback measures in inference mode, in which nothing has a gradient.
    with torch.inference_mode(False), torch.enable_grad(), precision_of(None, train.device.type):
        variance_D, mean_D = torch.var_mean(train.float(), dim=0, correction=0)
        std_D = variance_D.sqrt()
        varies_D = (std_D > (1e-6 * mean_D.abs()).clamp(min=1e-30)) & std_D.isfinite()
        mean_D, scale_D = torch.where(varies_D, mean_D, 0), torch.where(varies_D, 1 / std_D, 0)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        classes, targets = labels.cpu().unique(return_inverse=True)
        x_ND, targets_N = train[order.to(train.device)].float(), targets[order].to(train.device)
        x_ND = ((x_ND - mean_D) * scale_D).nan_to_num(0, 0, 0)  # an embedding that overflows must not end a run
        variances_D, directions_DD = torch.linalg.eigh(x_ND.T @ x_ND / len(x_ND))
        x_ND, variances_D = x_ND @ directions_DD, variances_D.clamp(min=0)
        if strength is None:
            num_held_out = max(1, len(x_ND) // 10)
            fitted, held_out = slice(max(1, len(x_ND) - num_held_out)), slice(-num_held_out, None)
            accuracies: list[float] = []
            for strength in STRENGTHS:
                part = x_ND[fitted], targets_N[fitted]
                weight_CD, bias_C, _ = _fit(*part, variances_D, len(classes), strength, TOLERANCE_OF_CHOICE)
                predicted_N = (x_ND[held_out] @ weight_CD.T + bias_C).argmax(dim=1)
                accuracies.append((predicted_N == targets_N[held_out]).float().mean().item())
                if len(accuracies) > 2 and max(accuracies[-2:]) < max(accuracies):
                    break
            strength = STRENGTHS[accuracies.index(max(accuracies))]
        weight_CD, bias_C, converged = _fit(x_ND, targets_N, variances_D, len(classes), strength, TOLERANCE)
        weight_CD = (weight_CD @ directions_DD.T * scale_D).double()
        bias_C = bias_C - weight_CD @ mean_D.double()
        return LinearProbe(classes.to(train.device), weight_CD, bias_C, strength, converged)


def _fit(
    x_ND: Tensor, targets_N: Tensor, variances_D: Tensor, num_classes: int, strength: float, tolerance: float
) -> tuple[Tensor, Tensor, bool]:
    """Return the weights, (C, D), the bias, (C,), and whether the solver converged."""
    # Scaled by the root of the loss's curvature at zero weights: collinear channels would slow the solver down.
    scale_D = (variances_D / num_classes + strength).rsqrt()
    u_CD = scale_D.new_zeros(num_classes, len(scale_D)).requires_grad_()
    bias_C = scale_D.new_zeros(num_classes).requires_grad_()
    solver = torch.optim.LBFGS(
        [u_CD, bias_C],
        max_iter=MAX_EVALUATIONS,
        max_eval=MAX_EVALUATIONS,
        tolerance_grad=tolerance,
        line_search_fn="strong_wolfe",
    )

    def loss() -> float:
        solver.zero_grad()
        weight_CD = scale_D * u_CD
        # Summed in float64, or the line search could not tell the last steps apart.
        nll_N = cross_entropy(x_ND @ weight_CD.T + bias_C, targets_N, reduction="none").double()
        total = nll_N.mean() + strength / 2 * weight_CD.square().sum().double()
        total.backward()
        return total.item()

    solver.step(loss)
    return (scale_D * u_CD).detach(), bias_C.detach(), solver.state[u_CD]["func_evals"] < MAX_EVALUATIONS
