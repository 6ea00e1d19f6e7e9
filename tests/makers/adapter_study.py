"""Compare the alignment's ridge map with Drift-Adapter's maps on the same pairs: yamls/ablations/adapters.csv.

python tests/makers/adapter_study.py OUT.csv CHECKPOINT...

CHECKPOINT is one of a run on the quickstart's images. Maps are fitted to 1,000 or to all 4,480 of its training images.
The bank is the teacher's output_mean of all of them; the queries are the student's embeddings of the 2,000 test images.

Drift-Adapter (Vejendla 2025, arXiv:2509.23471) maps by an orthogonal matrix, a low-rank affine map or a residual MLP. A
reproduction of it names a rank of 64, and 256 hidden units beside a linear map; we read only the paper's abstract. How
these maps are trained here is our choice: like the ridge's strength, the number of steps is the one with the least
error on every tenth pair, and a second fit includes these pairs. Seconds are one thread's CPU time, with that choice.
"""

import csv
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, mse_loss, normalize

from d2v_composer.checkpoints.load import load_models
from d2v_composer.evaluation.nearest_neighbors import common_fractions, exact_neighbors, retrieval_accuracy
from d2v_composer.models.alignment import HELD_OUT, Moments, side_by_side
from d2v_composer.models.backbone import Backbone
from d2v_composer.sources.labeled import load_labeled_set

CIFAR = Path(__file__).parents[2] / "yamls" / "quickstart" / "cifar10"
TARGET = "output_mean"
NUM_PAIRS = (1000, 4480)
RANK, HIDDEN = 64, 256
BATCH, LEARNING_RATE, STEPS = 64, 3e-3, (500, 2000)
FIELDS = ("run", "inputs", "channels", "map", "pairs", "recall_at_10", "top1", "seconds", "bytes")


class Map(NamedTuple):
    """A fitted map of embeddings, (N, I), to the teacher's space, (N, P)."""

    apply: Callable[[Tensor], Tensor]
    count: int
    """Its number of parameters."""


Fit = Callable[[Tensor, Tensor], Map]


def linear_map(weight: Tensor, bias: Tensor) -> Map:
    return Map(lambda x: linear(x, weight, bias), weight.numel() + bias.numel())


def ridge(sources: Tensor, targets: Tensor) -> Map:
    return linear_map(*Moments([(sources, targets)]).fit()[:2])


def low_rank_ridge(sources: Tensor, targets: Tensor) -> Map:
    """Project the ridge's predictions on their main directions (Izenman 1975, reduced-rank regression)."""
    weight, bias, _ = Moments([(sources, targets)]).fit()
    directions = torch.linalg.svd((sources - sources.mean(0)) @ weight.T, full_matrices=False).Vh[:RANK]
    weight, bias = directions.T @ directions @ weight, targets.mean(0)
    return Map(lambda x: linear(x - sources.mean(0), weight, bias), RANK * sum(weight.shape) + len(bias))


def rotation(sources: Tensor, targets: Tensor) -> Tensor:
    """Return the orthogonal matrix that takes the sources nearest to the targets (Schönemann 1966), (I, P)."""
    u, _, vh = torch.linalg.svd(sources.T @ targets, full_matrices=False)
    return u @ vh


def procrustes(sources: Tensor, targets: Tensor) -> Map:
    weight = rotation(normalize(sources), normalize(targets))
    return Map(lambda x: x @ weight, weight.numel())


def centered_procrustes(sources: Tensor, targets: Tensor) -> Map:
    """Rotate about the means, and scale each channel (Drift-Adapter's diagonal scaling)."""
    centered = [x - x.mean(0) for x in (sources, targets)]
    weight = rotation(*centered)
    rotated = centered[0] @ weight
    weight = weight * (rotated * centered[1]).sum(0) / rotated.square().sum(0)
    return linear_map(weight.T, targets.mean(0) - sources.mean(0) @ weight)


class LowRank(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Linear(inputs, RANK, bias=False), nn.Linear(RANK, outputs))


class ResidualMLP(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.skip = nn.Linear(inputs, outputs, bias=False)
        self.mlp = nn.Sequential(nn.Linear(inputs, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.mlp(x)


def trained(build: Callable[[int, int], nn.Module]) -> Fit:
    """Return a function that trains a module on standardized embeddings by AdamW, with a cosine schedule."""

    def fit_once(x: Tensor, y: Tensor, steps: int) -> nn.Module:
        torch.manual_seed(0)
        module = build(x.shape[1], y.shape[1])
        optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            chosen = torch.randint(len(x), (BATCH,))
            optimizer.zero_grad()
            mse_loss(module(x[chosen]), y[chosen]).backward()
            optimizer.step()
            schedule.step()
        return module.requires_grad_(False)

    def fit(sources: Tensor, targets: Tensor) -> Map:
        mean, scale = sources.mean(0), sources.std(0)
        center, spread = targets.mean(0), targets.std(0).square().mean().sqrt()  # one: errors keep their proportions
        x, y = (sources - mean) / scale, (targets - center) / spread
        is_held_out = torch.arange(len(x)) % HELD_OUT == HELD_OUT - 1
        errors = {
            steps: mse_loss(fit_once(x[~is_held_out], y[~is_held_out], steps)(x[is_held_out]), y[is_held_out]).item()
            for steps in STEPS
        }
        module = fit_once(x, y, min(errors, key=errors.__getitem__))
        # The means and scales are folded into the first and last layers.
        return Map(lambda x: center + spread * module((x - mean) / scale), sum(p.numel() for p in module.parameters()))

    return fit


MAPS: dict[str, Fit] = {
    "ridge (ours)": ridge,
    "orthogonal Procrustes": procrustes,
    "Procrustes, centered and scaled": centered_procrustes,
    "low-rank affine": trained(LowRank),
    "low-rank affine, closed form": low_rank_ridge,
    "residual MLP": trained(ResidualMLP),
}


def embed(model: Backbone, samples: Tensor) -> dict[str, Tensor]:
    """Return all embeddings of all samples, (N, D) float32 each."""
    with torch.inference_mode():
        # A pooling may be a view, which would keep all tokens.
        batches = [{name: x.clone() for name, x in model.embed_all(images).items()} for images in samples.split(64)]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def rows(checkpoint: str) -> list[dict[str, object]]:
    """Fit and measure all maps of one run's student."""
    student, teacher = load_models(checkpoint)
    assert teacher is not None
    config = teacher.encoder.config
    sets = load_labeled_set("mds", CIFAR, image_size=config.image_size, interpolation=config.interpolation)
    (train, queries), (bank, truth) = (
        [embed(model.eval(), part.samples) for part in (sets.train, sets.test)] for model in (student, teacher)
    )
    bank, truth = bank[TARGET], truth[TARGET]
    nearest = exact_neighbors(bank, truth, 10).indices

    def measured(found: Tensor, **about: object) -> dict[str, object]:
        recall = common_fractions(exact_neighbors(bank, found, 10).indices, nearest).mean().item()
        top1 = retrieval_accuracy(bank, sets.train.labels, found, sets.test.labels, (1,))[1]
        run = Path(checkpoint).parent.name
        return {"run": run, **about, "recall_at_10": round(100 * recall, 2), "top1": round(100 * top1, 2)}

    results = [measured(truth, inputs="teacher's " + TARGET, channels=bank.shape[1], map="none")]
    inputs = {"all" if len(names) > 1 else names[0]: names for names in (student.alignment_inputs, [TARGET])}
    for shown, names in inputs.items():
        sources, found = side_by_side(train, names), side_by_side(queries, names)
        if sources.shape[1] == bank.shape[1]:
            results.append(measured(found, inputs=shown, channels=bank.shape[1], map="none"))
        for pairs, (name, fit) in itertools.product(NUM_PAIRS, MAPS.items()):
            if "Procrustes" in name and sources.shape[1] != bank.shape[1]:
                continue  # a rotation keeps the width
            chosen = np.random.default_rng(0).permutation(len(bank))[:pairs]
            start = time.process_time()
            fitted = fit(sources[chosen], bank[chosen])
            about = {"inputs": shown, "channels": sources.shape[1], "map": name, "pairs": pairs}
            about |= {"seconds": round(time.process_time() - start, 3), "bytes": 4 * fitted.count}
            results.append(measured(fitted.apply(found), **about))
    return results


def main() -> None:
    """Write the table."""
    out, *checkpoints = sys.argv[1:]
    torch.set_num_threads(1)
    with Path(out).open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for checkpoint in checkpoints:
            writer.writerows(rows(checkpoint))
            file.flush()


if __name__ == "__main__":
    main()
