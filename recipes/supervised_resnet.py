"""Use ZeroShotRetrieval with another model: torchvision's ResNet-18, trained with labels on CIFAR-10 images.

    python recipes/supervised_resnet.py
    python recipes/supervised_resnet.py --epochs 1
    python recipes/supervised_resnet.py --epochs 20

Options: --epochs N, default 5. The script uses only the quickstart's images.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from d2v_composer.system import command_line

if __name__ == "__main__":
    command_line.begin(__doc__)

import torch
from composer import Trainer
from composer.models import ComposerClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from d2v_composer import ZeroShotRetrieval
from d2v_composer.sources.labeled import load_labeled_set
from d2v_composer.system.command_line import make_parser, print_next

CIFAR10 = Path(__file__).parent.parent / "yamls" / "quickstart" / "cifar10"


class Scale(nn.Module):
    """Convert uint8 to float from -1 to 1."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float() / 127.5 - 1


def main(argv: Sequence[str]) -> ZeroShotRetrieval:
    """Train, and print the accuracies before training and after each epoch."""
    parser = make_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=5, help="default: 5")
    arguments = parser.parse_args(argv)

    cifar10 = load_labeled_set("mds", CIFAR10, image_size=32, interpolation="bicubic")
    features = resnet18()
    features.fc = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]: replaces its classifier
    embed = nn.Sequential(Scale(), features)
    module = nn.Sequential(embed, nn.Linear(512, 10))
    retrieval = ZeroShotRetrieval({"cifar10": cifar10}, interval="1ep", embed=embed, at_start=True)
    on_terminal = sys.stderr.isatty()
    trainer = Trainer(
        model=ComposerClassifier(module, num_classes=10),
        train_dataloader=DataLoader(TensorDataset(*cifar10.train), batch_size=64, shuffle=True),
        optimizers=torch.optim.AdamW(module.parameters(), lr=1e-3),
        max_duration=f"{arguments.epochs}ep",
        callbacks=[retrieval],
        progress_bar=on_terminal,
        log_to_console=not on_terminal,
    )
    trainer.fit()
    trainer.close()
    for entry in retrieval.history:
        print(f"batch {entry['batch']}:", ", ".join(f"{key} {value:.1%}" for key, value in entry["metrics"].items()))
    print_next("composer recipes/train.py yamls/quickstart.yaml")
    return retrieval


if __name__ == "__main__":
    command_line.run(main)
