"""A linear probe: multinomial logistic regression on standardized embeddings.

It minimizes mean cross-entropy + strength / 2 · ‖W‖², W the weights without the bias: scikit-learn's
LogisticRegression with C = 1 / (strength · N) behind its StandardScaler.

Shapes: N training images, Q queries, D channels, C classes.
"""

import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from d2v_composer.evaluation.nearest_neighbors import full_float32

STRENGTHS = tuple(10.0**exponent for exponent in range(1, -8, -1))
"""The L2 strengths to choose from, strongest first."""
# The solver stops at this largest gradient, or before it where float32 cannot tell two losses apart.
TOLERANCE, TOLERANCE_OF_CHOICE = 1e-6, 1e-3
LARGEST_GRADIENT = 1e-4  # of a fit that has converged
MAX_ITERATIONS = 500
LOGITS_AT_ONCE = 1 << 24

log = logging.getLogger(__name__)


class LinearProbe(NamedTuple):
    """A fitted classifier of embeddings."""

    classes: Tensor
    """Labels, ascending, (C,)."""
    mean: Tensor
    """Mean of the training embeddings, (D,)."""
    scale: Tensor
    """1 / their standard deviation, (D,); 0 for a constant channel."""
    weight: Tensor
    """(C, D)."""
    bias: Tensor
    """(C,)."""
    strength: float

    def predict(self, embeddings: Tensor) -> Tensor:
        """Return the labels of embeddings, (Q, D) → (Q,)."""
        with full_float32(embeddings.device.type):
            logits_QC = torch.addmm(self.bias, (embeddings - self.mean) * self.scale, self.weight.T)
        return self.classes[logits_QC.argmax(dim=1)]


def linear_probe_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, strength: float | None = None
) -> float:
    """Return the share of test images that a linear probe of the training images classifies right, from 0 to 1.

    Args:
        train: (N, D).
        train_labels: (N,) int.
        test: (Q, D), Q ≥ 1.
        test_labels: (Q,) int.
        strength: L2 penalty strength; default: as :func:`fit_linear_probe` chooses.
    """
    probe = fit_linear_probe(train, train_labels, strength)
    return (probe.predict(test) == test_labels.to(test.device)).double().mean().item()


def fit_linear_probe(train: Tensor, labels: Tensor, strength: float | None = None) -> LinearProbe:
    """Fit a linear probe by L-BFGS in float32; always the same on a machine.

    The strength is the one of ``STRENGTHS`` that classifies a random tenth of the images best, without them in the fit;
    of equally good ones the strongest. The probe is then fitted to all images.

    Args:
        train: (N, D), any float dtype, on the device that computes. It needs twice as much memory again.
        labels: (N,) int.
        strength: L2 penalty strength; default: chosen.
    """
    # A callback measures in inference mode, in which nothing has a gradient.
    with torch.inference_mode(False), full_float32(train.device.type):
        variance_D, mean_D = torch.var_mean(train.float(), dim=0, correction=0)
        std_D = variance_D.sqrt()
        varies_D = (std_D > (1e-6 * mean_D.abs()).clamp(min=1e-30)) & std_D.isfinite()
        mean_D, scale_D = torch.where(varies_D, mean_D, 0), torch.where(varies_D, 1 / std_D, 0)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        classes, targets = labels.cpu().unique(return_inverse=True)
        x_ND, targets_N = train[order.to(train.device)].float(), targets[order].to(train.device)
        x_ND = ((x_ND - mean_D) * scale_D).nan_to_num(0, 0, 0)  # an embedding that overflows must not end a run
        variances_D, directions_DD = torch.linalg.eigh(x_ND.T @ x_ND / len(x_ND))
        problem = Problem(x_ND @ directions_DD, variances_D.clamp(min=0), targets_N, len(classes))
        strength = problem.choose_strength() if strength is None else strength
        weight_CD, bias_C, largest_gradient = problem.fit(len(train), strength, TOLERANCE)
        if largest_gradient > LARGEST_GRADIENT:
            log.warning("linear probe: not converged in %d iterations at strength %g", MAX_ITERATIONS, strength)
        classes, weight_CD = classes.to(train.device), weight_CD @ directions_DD.T
        return LinearProbe(classes, mean_D, scale_D, weight_CD, bias_C, strength)


class Problem(NamedTuple):
    """Shuffled, standardized images to fit, rotated to their principal directions; the last tenth chooses the strength.

    At zero weights, the loss has the curvature variance / C + strength along each direction. The solver's unknowns are
    the weights there times the root of it: all its problems are alike then, and collinear channels do not slow it down.
    """

    x: Tensor
    variances: Tensor
    targets: Tensor
    num_classes: int

    def choose_strength(self) -> float:
        """Return the best strength; weaker ones are not tried after two that are worse than the best."""
        num_fitted = max(1, len(self.x) - max(1, len(self.x) // 10))
        held_out = slice(min(num_fitted, len(self.x) - 1), None)  # a single image is both
        accuracies: list[float] = []
        for strength in STRENGTHS:
            weight_CD, bias_C, _ = self.fit(num_fitted, strength, TOLERANCE_OF_CHOICE)
            found = torch.addmm(bias_C, self.x[held_out], weight_CD.T).argmax(dim=1)
            accuracies.append((found == self.targets[held_out]).float().mean().item())
            if len(accuracies) > 2 and max(accuracies[-2:]) < max(accuracies):
                break
        return STRENGTHS[accuracies.index(max(accuracies))]

    def fit(self, num_images: int, strength: float, tolerance: float) -> tuple[Tensor, Tensor, float]:
        """Fit the first images: weights, (C, D), bias, (C,), and the largest gradient there."""
        scale_D = (self.variances / self.num_classes + strength).rsqrt()
        u_CD, bias_C = scale_D.new_zeros(self.num_classes, len(scale_D)), scale_D.new_zeros(self.num_classes)
        unknowns = [u_CD.requires_grad_(), bias_C.requires_grad_()]
        solver = torch.optim.LBFGS(
            unknowns,
            max_iter=MAX_ITERATIONS,
            max_eval=3 * MAX_ITERATIONS,
            tolerance_grad=tolerance,
            line_search_fn="strong_wolfe",
        )
        rows = max(1, LOGITS_AT_ONCE // self.num_classes)
        parts = [each[:num_images].split(rows) for each in (self.x, self.targets)]
        best: list[Tensor] = []
        least = math.inf

        def loss() -> float:
            nonlocal best, least
            solver.zero_grad()
            losses = [strength / 2 * (scale_D * u_CD).square().sum().double()]
            losses[0].backward()
            for x, targets in zip(*parts, strict=True):  # in bounded memory
                # Summed in float64, or the line search could not tell the last steps apart.
                nll = cross_entropy(x @ (scale_D * u_CD).T + bias_C, targets, reduction="none")
                losses.append(nll.double().sum() / num_images)
                losses[-1].backward()
            largest = max(each.grad.abs().max().item() for each in unknowns if each.grad is not None)
            if largest < least:  # in float32, a last line search may end at a worse point
                best, least = [each.detach().clone() for each in unknowns], largest
            return torch.stack(losses).sum().item()

        with torch.enable_grad():
            solver.step(loss)
        return scale_D * best[0], best[1], least
