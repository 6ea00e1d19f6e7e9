"""Convert ImageNet, or any folder of images, to MDS shards: ``python recipes/convert_imagenet.py SOURCE OUT``."""

from d2v_composer.commands.convert_imagenet import main
from d2v_composer.system import cli

__all__ = ["main"]

if __name__ == "__main__":
    cli.run(main)
