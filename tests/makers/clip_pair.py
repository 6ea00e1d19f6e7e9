"""Train a small CLIP-like pair on labeled images: a timm ViT with a projection, and a text tower on class names.

    python tests/makers/clip_pair.py OUT [EPOCHS]

OUT receives ``teacher.safetensors`` (timm/test_vit at 64 px, with a head of 64 channels) and ``classes.npy``, the text
tower's embedding of each class of yamls/quickstart/cifar10. It takes about two minutes on one core.
"""

import sys
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, normalize

from d2v_composer.sources.labeled import LabeledSamples, load_labeled_set

SIZE, WIDTH, BATCH = 64, 64, 128
CIFAR10 = Path(__file__).parents[2] / "yamls" / "quickstart" / "cifar10"


class TextTower(nn.Module):
    """Characters → GRU → the space of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(128, 32)
        self.reader = nn.GRU(32, WIDTH, batch_first=True)
        self.projection = nn.Linear(WIDTH, WIDTH)

    def forward(self, names: tuple[str, ...]) -> Tensor:
        """Return the embedding of each name, (C, P)."""
        read = [self.reader(self.characters(torch.tensor([list(name.encode())])))[1][0] for name in names]
        return self.projection(torch.cat(read))


def prepare(images: Tensor) -> Tensor:
    """Resize and normalize uint8 images."""
    resized = interpolate(images, (SIZE, SIZE), mode="bicubic", antialias=True)
    return (resized.float() / 255 - 0.5) / 0.5


def train(images: nn.Module, texts: TextTower, data: LabeledSamples, names: tuple[str, ...], epochs: int) -> None:
    """Train both by a contrastive loss between a batch's images and all names."""
    scale = nn.Parameter(torch.tensor(2.0))
    groups = [{"params": [*images.parameters(), *texts.parameters()]}, {"params": [scale], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, weight_decay=0.05)
    steps = epochs * (len(data.labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.labels)).split(BATCH)[: len(data.labels) // BATCH]:
            batch = data.samples[rows]
            if torch.rand(()) < 0.5:
                batch = batch.flip(-1)
            shift = torch.randint(-4, 5, (2,)).tolist()
            pictures = normalize(images(prepare(batch.roll(shift, (-2, -1)))), dim=1)
            logits = scale.exp() * pictures @ normalize(texts(names), dim=1).T
            loss = cross_entropy(logits, data.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"loss {loss.item():.3f}", file=sys.stderr)


def main(out: Path, epochs: int = 12) -> None:
    """Train the pair and write the files."""
    torch.manual_seed(0)
    train_set, test, names, *_ = load_labeled_set("mds", CIFAR10, image_size=32)
    images = timm.create_model("test_vit", num_classes=WIDTH, img_size=SIZE)
    texts = TextTower()
    train(images.train(), texts, train_set, names, epochs)
    with torch.no_grad():
        classes = texts(names)
        embeddings = torch.cat([images.eval()(prepare(batch)) for batch in test.samples.split(500)])
    hits = (normalize(embeddings, dim=1) @ normalize(classes, dim=1).T).argmax(dim=1) == test.labels
    print(f"zero-shot top-1 of the pair: {hits.double().mean():.4f}")
    out.mkdir(parents=True, exist_ok=True)
    save_file(images.state_dict(), out / "teacher.safetensors")
    np.save(out / "classes.npy", classes.numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
