"""Convert images to MDS shards on a Ray cluster.

    pip install -e '.[ray]'
    python recipes/ray_convert.py s3://bucket/tars s3://bucket/shards --resize 256

usage: ray_convert.py SOURCE OUT [options of d2v convert-images]

Every machine needs access to SOURCE and OUT. Run the same command again to resume an interrupted conversion.
"""

import sys
from collections.abc import Sequence

from d2v_composer.system.command_line import show_help

if __name__ == "__main__":
    show_help(sys.argv[1:], __doc__)

import ray  # pyright: ignore[reportMissingImports]  (an extra)

from d2v_composer.commands import convert_images, merge

PARTS = 64  # each is the work of one core


def convert(command: Sequence[str]) -> None:
    convert_images.main(command)


def main(*argv: str) -> None:
    """Convert the missing parts, and merge all parts."""
    commands = ([*argv, "--workers", "1", "--part", f"{part}/{PARTS}"] for part in range(PARTS))
    remote = ray.remote(convert)
    ray.get([remote.remote(command) for command in commands])
    merge.main([argv[1]])


if __name__ == "__main__":
    main(*sys.argv[1:])
