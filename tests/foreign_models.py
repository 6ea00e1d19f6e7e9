"""Models of other projects, which Composer trains."""

from typing import Any

import torch
from composer import Trainer
from composer.models import ComposerModel
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Linear(ComposerModel):
    """A model with a known gradient: its loss is the mean over the batch of w · x."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1, bias=False)

    def forward(self, batch: Tensor) -> Tensor:
        return self.linear(batch)

    def loss(self, outputs: Tensor, batch: Tensor) -> Tensor:
        return outputs.mean()


class Classifier(ComposerModel):
    """Another project's model of images, whose first layer embeds them."""

    def __init__(self, num_pixels: int) -> None:
        super().__init__()
        self.backbone = nn.Linear(num_pixels, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, batch: Any) -> Tensor:
        return self.head(Classifier.embed(self, batch[0]))

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])

    def embed(self, images: Tensor) -> Tensor:
        return self.backbone(images.flatten(1) / 255)


def fit(model: ComposerModel, loader: DataLoader, max_duration: str, lr: float = 0.01, **options: Any) -> None:
    """Train a model of another project with SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    settings: dict[str, Any] = {"train_dataloader": loader, "optimizers": optimizer, "progress_bar": False}
    trainer = Trainer(model=model, max_duration=max_duration, **settings | options)
    trainer.fit()
    trainer.close()
