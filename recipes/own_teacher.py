"""Distill a student from your own module: replace ``Tokens``, and the arguments of ``FrozenModel``.

usage: python recipes/own_teacher.py [dotted.key=value …]

In this example, the teacher is a ViT with random weights, and the images are the quickstart's. Run the same command
again to resume an interrupted run.
"""

from collections.abc import Sequence
from typing import Any

import timm
import torch

from d2v_composer import FrozenModel, load_config, train_student
from d2v_composer.system import command_line


class Tokens(torch.nn.Module):
    """A module that maps images to tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.vit: Any = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the tokens of normalized images, (B, 3, 32, 32): CLS, then patches row by row, (B, 17, 192)."""
        return self.vit.forward_features(images)


def load(checkpoint: str | None = None) -> FrozenModel:
    """Load the teacher. If a package offers this function as ``ext/NAME``, ``teacher.checkpoint`` is passed to it."""
    torch.manual_seed(0)
    options = {"image_size": 32, "grid_size": (4, 4), "has_cls_token": True}
    return FrozenModel(Tokens(), source="random weights", license="unknown", **options)


def main(argv: Sequence[str]) -> None:
    settings = ["teacher.model=ext/own_teacher", "teacher.checkpoint=null", "run_name=own_teacher"]
    train_student(load_config(["yamls/quickstart.yaml", *settings, *argv]), teacher=load())


if __name__ == "__main__":
    command_line.run(main)  # bad input is one line
