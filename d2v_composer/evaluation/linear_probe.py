"""A linear probe: multinomial logistic regression on standardized embeddings.

It minimizes mean cross-entropy + strength / 2 · ‖W‖², W the weights without the bias: scikit-learn's
LogisticRegression with C = 1 / (strength · N) behind its StandardScaler.

Shapes: N training images, Q queries, D channels, R = min(N, D), C classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from d2v_composer.evaluation.nearest_neighbors import ONE_RANK, Ranks, full_float32

STRENGTHS = tuple(10.0**exponent for exponent in range(1, -8, -1))
"""The L2 strengths to choose from, strongest first."""
RETRY_TIMEOUT = 2  # weaker ones are not tried after so many that are worse than the best
SEED = 0  # of the choice of the images held out
# The solver stops at this largest gradient, or before it where float32 cannot tell two losses apart.
TOLERANCE, TOLERANCE_OF_CHOICE = 1e-6, 1e-3
LARGEST_GRADIENT = 1e-4  # of a fit that has converged
MAX_ITERATIONS = 500
LOGITS_AT_ONCE = 1 << 24


class LinearProbe(NamedTuple):
    """A fitted classifier of embeddings."""

    classes: Tensor
    """(C,) the labels, ascending."""
    mean: Tensor
    """(D,) of the training embeddings."""
    scale: Tensor
    """(D,) 1 / their standard deviation; 0 for a constant channel."""
    weight: Tensor
    """(C, D)."""
    bias: Tensor
    """(C,)."""
    strength: float
    is_at_edge: bool
    """The best strength is the grid's first or last, so that one beyond it may be better."""
    has_converged: bool

    def predict(self, embeddings: Tensor) -> Tensor:
        """Return the labels of embeddings, (Q, D) → (Q,)."""
        with full_float32(embeddings.device.type):
            parts = embeddings.split(max(1, LOGITS_AT_ONCE // max(self.weight.shape)))
            logits = (torch.addmm(self.bias, (part - self.mean) * self.scale, self.weight.T) for part in parts)
            return torch.cat([self.classes[each.argmax(dim=1)] for each in logits])

    @property
    def doubt(self) -> str | None:
        """Why the accuracy may be too low; ``None``: nothing is known against it."""
        if not self.has_converged:
            return f"not converged within {MAX_ITERATIONS} iterations"
        return f"the best L2 strength, {self.strength:g}, is the grid's last on that side" if self.is_at_edge else None


class Fit(NamedTuple):
    weight: Tensor
    bias: Tensor
    largest_gradient: float

    @property
    def has_converged(self) -> bool:
        return self.largest_gradient <= LARGEST_GRADIENT


def linear_probe_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, strength: float | None = None
) -> float:
    """Return the share of test images that a linear probe of the training images classifies right, from 0 to 1.

    Args:
        train: (N, D).
        train_labels: (N,) int.
        test: (Q, D), Q ≥ 1.
        test_labels: (Q,) int.
        strength: Of the L2 penalty; default: as :func:`fit_linear_probe` chooses.
    """
    probe = fit_linear_probe(train, train_labels, strength)
    return (probe.predict(test) == test_labels.to(test.device)).double().mean().item()


def fit_linear_probe(
    train: Tensor, labels: Tensor, strength: float | None = None, ranks: Ranks = ONE_RANK
) -> LinearProbe:
    """Fit a linear probe by L-BFGS in float32; always the same on a machine, on any number of ranks.

    The strength is the one of ``STRENGTHS`` that classifies a random tenth of the images best, without them in the fit;
    of equally good ones the strongest. The probe is then fitted to all images.

    Args:
        train: (N, D), any float dtype, on the device that computes. It needs as much memory again.
        labels: (N,) int.
        strength: Of the L2 penalty; default: chosen.
        ranks: The processes that share the strengths, all with the same arguments.
    """
    # A solver's state cannot be kept in inference mode, in which a callback measures.
    with torch.inference_mode(False), torch.no_grad(), full_float32(train.device.type):
        problem = Problem(train, labels)
        chosen, is_at_edge = (strength, False) if strength is not None else choose_strength(problem, ranks)
        fit = problem.fit(len(train), chosen, TOLERANCE)
        standardized = (problem.classes, problem.mean, problem.scale)
        return LinearProbe(*standardized, fit.weight, fit.bias, chosen, is_at_edge, fit.has_converged)


def choose_strength(problem: "Problem", ranks: Ranks) -> tuple[float, bool]:
    """Return the best strength, and whether it is at the edge of those to choose from."""
    accuracies: list[float] = []
    for group in torch.tensor(STRENGTHS, dtype=torch.float64).split(ranks.world_size):
        mine = problem.held_out_accuracy(ranks.take_share(group).item())
        accuracies += ranks.gather(problem.mean.new_tensor([mine]), len(group)).tolist()
        tried = next((i for i in range(1, len(accuracies)) if is_past_best(accuracies[: i + 1])), None)
        if tried is not None:  # also of fewer than this group, so that the number of ranks does not matter
            accuracies = accuracies[: tried + 1]
            break
    best = accuracies.index(max(accuracies))
    neighbor = 1 if best == 0 else best - 1
    is_at_edge = best in (0, len(STRENGTHS) - 1) and accuracies[best] > accuracies[neighbor]
    return STRENGTHS[best], is_at_edge


def is_past_best(accuracies: list[float]) -> bool:
    return len(accuracies) > RETRY_TIMEOUT and max(accuracies[-RETRY_TIMEOUT:]) < max(accuracies)


class Problem:
    """The images of a linear probe, standardized and shuffled, those held out last.

    Args:
        train: (N, D).
        labels: (N,) int.
    """

    def __init__(self, train: Tensor, labels: Tensor) -> None:
        self.mean, self.scale = standardization(train)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SEED))
        classes, targets = labels.cpu().unique(return_inverse=True)
        self.classes, self.targets_N = classes.to(train.device), targets[order].to(train.device)
        self.x_ND = train[order.to(train.device)].float().sub_(self.mean).mul_(self.scale)
        self.x_ND.nan_to_num_(0, 0, 0)  # an embedding that overflows must not end a training
        self.num_fitted = max(1, len(train) - max(1, len(train) // 10))  # an only image is both fitted and held out
        self.variances_R, self.directions_DR = principal_directions(self.x_ND)

    def held_out_accuracy(self, strength: float) -> float:
        """Return the accuracy on the images held out of a fit to the others."""
        weight_CD, bias_C, _ = self.fit(self.num_fitted, strength, TOLERANCE_OF_CHOICE)
        held_out = slice(min(self.num_fitted, len(self.x_ND) - 1), None)
        found = torch.addmm(bias_C, self.x_ND[held_out], weight_CD.T).argmax(dim=1)
        return (found == self.targets_N[held_out]).float().mean().item()

    def fit(self, num_images: int, strength: float, tolerance: float) -> Fit:
        """Fit the first images.

        At zero weights, the loss has the curvature variance / C + strength along each principal direction. The solver's
        unknowns are the weights there, times the root of it: its problems then are all alike, and collinear channels
        do not slow it down. Beyond the R directions the embeddings do not vary, and the best weights are 0. Weights
        have a row a class: every product of matrices then reads along the rows of embeddings and directions.
        """
        x_ND, targets_N, num_classes = self.x_ND[:num_images], self.targets_N[:num_images], len(self.classes)
        scale_R = (self.variances_R / num_classes + strength).rsqrt()
        u_CR, bias_C = x_ND.new_zeros(num_classes, len(scale_R)), x_ND.new_zeros(num_classes)
        solver = torch.optim.LBFGS(
            [u_CR, bias_C],
            max_iter=MAX_ITERATIONS,
            max_eval=3 * MAX_ITERATIONS,
            tolerance_grad=tolerance,
            line_search_fn="strong_wolfe",
        )

        # Where float32 cannot tell two losses apart, a last line search may end at a worse point.
        best: Fit | None = None

        def loss() -> float:
            nonlocal best
            w_CD = (scale_R * u_CR) @ self.directions_DR.T
            loss, gradient_CD, gradient_C = cross_entropy(x_ND, targets_N, w_CD, bias_C)
            gradient_CR = scale_R * (gradient_CD.add_(w_CD, alpha=strength) @ self.directions_DR)
            u_CR.grad, bias_C.grad = gradient_CR, gradient_C
            largest = max(gradient_CR.abs().max().item(), gradient_C.abs().max().item())
            if best is None or largest < best.largest_gradient:
                best = Fit(w_CD, bias_C.clone(), largest)
            return loss + strength / 2 * w_CD.square().cpu().double().sum().item()

        solver.step(loss)
        assert best is not None  # each step begins with the loss
        return best


def standardization(train: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and 1 / standard deviation of each channel, (D,) each, (0, 0) if it is constant to rounding."""
    variance_D, mean_D = torch.var_mean(train.float(), dim=0, correction=0)
    std_D = variance_D.sqrt()
    varies_D = (std_D > (1e-6 * mean_D.abs()).clamp(min=1e-30)) & std_D.isfinite()
    return torch.where(varies_D, mean_D, 0), torch.where(varies_D, 1 / std_D, 0)


def principal_directions(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return the variances, (R,), along the R = min(N, D) principal directions, and these, (D, R)."""
    num_images, dim = x_ND.shape
    if num_images < dim:
        _, lengths_R, directions_RD = torch.linalg.svd(x_ND, full_matrices=False)
        return lengths_R.square() / num_images, directions_RD.T
    variances_R, directions_DR = torch.linalg.eigh(x_ND.T @ x_ND / num_images)
    return variances_R.clamp(min=0), directions_DR


def cross_entropy(x_ND: Tensor, targets_N: Tensor, weight_CD: Tensor, bias_C: Tensor) -> tuple[float, Tensor, Tensor]:
    """Return the mean cross-entropy, and its gradients of weight and bias, in bounded memory."""
    loss, gradient_CD, gradient_C = 0.0, torch.zeros_like(weight_CD), torch.zeros_like(bias_C)
    rows = max(1, LOGITS_AT_ONCE // len(bias_C))
    for x, targets in zip(x_ND.split(rows), targets_N.split(rows), strict=True):
        log_probabilities = torch.addmm(bias_C, x, weight_CD.T).log_softmax(dim=1)
        # In float32 the line search could not tell the last steps apart.
        loss -= log_probabilities.gather(1, targets[:, None]).cpu().double().sum().item()
        error = log_probabilities.exp_()  # probabilities minus one-hot targets
        error[torch.arange(len(targets), device=x.device), targets] -= 1
        gradient_CD += error.T @ x
        gradient_C += error.sum(dim=0)
    return loss / len(x_ND), gradient_CD.div_(len(x_ND)), gradient_C.div_(len(x_ND))
