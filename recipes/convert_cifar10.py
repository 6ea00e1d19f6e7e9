"""Write CIFAR-10 as MDS, for training and for retrieval.

    python recipes/convert_cifar10.py datasets/cifar10
    python recipes/convert_cifar10.py datasets/cifar10 --images /data/cifar

writes OUT/train and OUT/test, unless they exist.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from d2v_composer.system import command_line
from d2v_composer.system.command_line import print_next

EXPECTED = Path("datasets/cifar10")
"""The folder that yamls/cifar10.yaml names."""


def main(argv: Sequence[str]) -> None:
    """Convert both splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder")
    parser.add_argument(
        "--images", type=Path, default=Path("datasets"), help="folder of torchvision's CIFAR-10; default: %(default)s"
    )
    arguments = parser.parse_args(argv)

    from d2v_composer.data.convert import convert_cifar10  # takes seconds

    convert_cifar10(arguments.images, arguments.out)
    print(f"{arguments.out}: 50,000 training and 10,000 test images")
    print_next(shlex.join(["composer", "recipes/train.py", "yamls/cifar10.yaml", *changes_of_yaml(arguments.out)]))


def changes_of_yaml(out: Path) -> list[str]:
    """Return what to change in yamls/cifar10.yaml for its images to be those in a folder."""
    return [] if out == EXPECTED else [f"train_loader.local={out / 'train'}", f"retrieval.datasets.cifar10.root={out}"]


if __name__ == "__main__":
    command_line.run(main)
