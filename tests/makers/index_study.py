"""Measure what decides how well a student searches its teacher's index: yamls/ablations/index.csv.

python tests/makers/index_study.py OUT.csv ROOT TARGET IMAGES PAIRS CHECKPOINT...

ROOT is CIFAR-10 as MDS in ROOT/train and ROOT/test; TARGET is the teacher's embedding to map to; CHECKPOINT is a run's.
The queries are IMAGES test images, the bank has as many train images, and up to PAIRS other train images are those to
which the maps are fitted.
"""

import csv
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import linear, mse_loss

from d2v_composer.checkpoints.load import load_models
from d2v_composer.evaluation.evaluate import share_encoders
from d2v_composer.evaluation.nearest_neighbors import common_fractions, exact_neighbors, retrieval_accuracy
from d2v_composer.models import alignment
from d2v_composer.models.alignment import Moments, side_by_side
from d2v_composer.runs.comparison import build_untrained
from d2v_composer.sources.labeled import load_labeled_set

BATCH = 64
FEW = 2000  # as many pairs as the quickstart fits to
NUM_PAIRS = (100, 300, 1000, 3000, 10_000, 45_000)
EPOCHS = 20
FIELDS = ("run", "model", "inputs", "target", "pairs", "map", "teacher_index", "own_index", "neighbors", "r2")

Embeddings = Mapping[str, Tensor]


class Bench:
    """Embeddings of all models of one run, by split: fit, bank, queries.

    Args:
        checkpoint: The run's.
        root: The data set.
        count: The number of queries, and of the bank's samples.
        pairs: The number of samples to fit to.
    """

    def __init__(self, checkpoint: str, root: str, count: int, pairs: int) -> None:
        student, teacher = load_models(checkpoint)
        assert teacher is not None
        torch.manual_seed(0)
        untrained = build_untrained(student, teacher)
        assert untrained is not None
        self.run, self.poolings = Path(checkpoint).parent.name, student.alignment_inputs
        config = teacher.encoder.config
        sets = load_labeled_set(
            "mds",
            root,
            image_size=config.image_size,
            interpolation=config.interpolation,
            max_images=count + pairs,
        )
        models = {"untrained student": untrained.eval(), "student": student.eval(), "teacher": teacher.eval()}
        embeds = share_encoders(teacher, models, student.layer_mean)
        order = torch.randperm(len(sets.train.labels), generator=torch.Generator().manual_seed(0))
        places = torch.randperm(len(sets.test.labels), generator=torch.Generator().manual_seed(0))[:count]
        parts = {
            "bank": (sets.train, order[:count]),
            "fit": (sets.train, order[count:]),
            "queries": (sets.test, places),
        }
        self.labels = {part: labeled.labels[numbers] for part, (labeled, numbers) in parts.items()}
        self.embeddings: dict[str, dict[str, Embeddings]] = {
            part: embed_all(embeds, labeled.samples, numbers) for part, (labeled, numbers) in parts.items()
        }

    def inputs(self, model: str, names: list[str], part: str) -> Tensor:
        return side_by_side(self.embeddings[part][model], names)

    def top1(self, bank: Tensor, queries: Tensor) -> float:
        labels = self.labels["bank"], self.labels["queries"]
        return round(100 * retrieval_accuracy(bank, labels[0], queries, labels[1], (1,))[1], 1)

    def row(self, bank: Tensor, queries: Tensor, target: str, **about: object) -> dict[str, object]:
        """Measure queries in the teacher's index, and in their own one, given the same map of the bank."""
        index, truth = (self.embeddings[part]["teacher"][target] for part in ("bank", "queries"))
        nearest = [exact_neighbors(index, rows, 10).indices for rows in (queries, truth)]
        unexplained = ((queries - truth) ** 2).sum() / ((truth - index.mean(0)) ** 2).sum()
        return {
            "run": self.run,
            "target": target,
            **about,
            "teacher_index": self.top1(index, queries),
            "own_index": self.top1(bank, queries),
            "neighbors": round(100 * common_fractions(*nearest).mean().item(), 1),
            "r2": round(1 - unexplained.item(), 3),
        }

    def mapped(self, model: str, names: list[str], target: str, pairs: int, how: str = "ridge") -> dict[str, object]:
        """Fit a map from a model's embeddings to the teacher's, and measure it."""
        sources = self.inputs(model, names, "fit")[:pairs]
        targets = self.embeddings["fit"]["teacher"][target][:pairs]
        weight, bias = trained_head(sources, targets) if how == "trained" else Moments([(sources, targets)]).fit()[:2]
        bank, queries = (linear(self.inputs(model, names, part), weight, bias) for part in ("bank", "queries"))
        shown = "all" if len(names) > 1 else names[0]
        return self.row(bank, queries, target, model=model, inputs=shown, pairs=len(sources), map=how)


def embed_all(embeds: Mapping, samples: Tensor, numbers: Tensor) -> dict[str, Embeddings]:
    """Embed samples by all models, (N, D) each."""
    batches = []
    with torch.inference_mode():
        for chosen in numbers.split(BATCH):
            images = samples[chosen]
            embedded = {model: embed(images) for model, embed in embeds.items()}
            raw = next(iter(embeds))  # pixels have no poolings
            embedded[raw] = {raw: embedded[raw]}
            # A pooling may be a view, which would keep all tokens.
            batches.append({model: {name: x.clone() for name, x in embedded[model].items()} for model in embeds})
    return {
        model: {name: torch.cat([batch[model][name].float() for batch in batches]) for name in batches[0][model]}
        for model in embeds
    }


def trained_head(sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Train a linear layer by Adam on standardized embeddings, as people do instead; return its weight and bias."""
    torch.manual_seed(0)
    (mean, scale), (center, spread) = ((x.mean(0), x.std(0).clamp(min=1e-6)) for x in (sources, targets))
    with torch.enable_grad():
        head = torch.nn.Linear(sources.shape[1], targets.shape[1])
        optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
        steps = EPOCHS * -(-len(sources) // BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(EPOCHS):
            for chosen in torch.randperm(len(sources)).split(BATCH):
                optimizer.zero_grad()
                mse_loss(head((sources[chosen] - mean) / scale), (targets[chosen] - center) / spread).backward()
                optimizer.step()
                schedule.step()
    weight = spread[:, None] * head.weight.detach() / scale
    return weight, spread * head.bias.detach() + center - weight @ mean


def rows(bench: Bench, main_target: str) -> Iterator[dict[str, object]]:
    """Yield all rows of a run; those that vary something else map to the main target."""
    poolings = bench.poolings
    of_teacher = bench.embeddings["bank"]["teacher"], bench.embeddings["queries"]["teacher"]
    for name in poolings:
        bank, queries = (bench.embeddings[part]["student"][name] for part in ("bank", "queries"))
        about = {"model": "student", "inputs": name, "pairs": 0}
        if name not in of_teacher[0] or bank.shape[1] != of_teacher[0][name].shape[1]:
            yield {"run": bench.run, **about, "map": "none", "own_index": bench.top1(bank, queries)}
            continue
        yield bench.row(bank, queries, name, **about, map="none")
        means = [rows.mean(0) for rows in (bank, of_teacher[0][name])]
        yield bench.row(bank - means[0], queries - means[0] + means[1], name, **about, map="shift")
    for name in of_teacher[0]:
        yield bench.row(*(part[name] for part in of_teacher), name, model="teacher", inputs=name, pairs=0, map="none")
    for model in ("student", "untrained student"):
        yield bench.mapped(model, poolings, main_target, FEW)
    for model in ("encoder", "pixels"):
        yield bench.mapped(model, [*bench.embeddings["fit"][model]][:2], main_target, FEW)
    for name in poolings if len(poolings) > 1 else ():
        yield bench.mapped("student", [name], main_target, FEW)
    for target in of_teacher[0]:
        if target != main_target:
            yield bench.mapped("student", poolings, target, FEW)
    for pairs in NUM_PAIRS:
        if pairs <= len(bench.labels["fit"]):
            yield bench.mapped("student", poolings, main_target, pairs)
    for strength in (1e-8, 1e-6, 1e-4, 1e-2, 1.0):
        with patch.object(alignment, "STRENGTHS", [strength]):
            yield bench.mapped("student", poolings, main_target, FEW) | {"map": f"ridge {strength:g}"}
    yield bench.mapped("student", poolings, main_target, FEW, "trained")


def main() -> None:
    """Write the table."""
    out, root, target, count, pairs, *checkpoints = sys.argv[1:]
    with Path(out).open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for checkpoint in checkpoints:
            for row in rows(Bench(checkpoint, root, int(count), int(pairs)), target):
                writer.writerow(row)
                file.flush()


if __name__ == "__main__":
    main()
