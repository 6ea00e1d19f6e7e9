"""Convert ImageNet, or any folder of images, to MDS shards.

    d2v convert-images /data/ILSVRC s3://bucket/imagenet/train --resize 256
    d2v convert-images /data/ILSVRC s3://bucket/imagenet/val --resize 256 --split val
    d2v convert-images photos datasets/photos --labels none --workers 8

Set an S3-compatible store with S3_ENDPOINT_URL, and its credentials with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
An interrupted conversion leaves no index.json, so no reader takes it for a data set. Run the same command again to
resume it. With other settings it starts over; old shards in an object store are listed at the end, not deleted.
Layouts and labels files: see find_images in d2v_composer/data/convert.py.
"""

import argparse
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from d2v_composer.system.command_line import make_parser, print_next, size
from d2v_composer.system.errors import InputError

if TYPE_CHECKING:
    from d2v_composer.data.convert import Conversion


def main(argv: Sequence[str]) -> "Conversion":
    """Convert, verify, and print a report."""
    arguments = parse(argv)

    from d2v_composer.data.convert import Encoding, convert_images, find_images

    start = time.monotonic()
    conversion = convert_images(
        find_images(arguments.source, arguments.split, arguments.labels),
        arguments.out,
        Encoding(arguments.resize, arguments.quality),
        seed=arguments.seed,
        workers=arguments.workers,
        shard_bytes=arguments.shard_size,
        skip_unreadable=arguments.skip_unreadable,
    )
    print_report(conversion, time.monotonic() - start)
    print_next(f"composer recipes/train.py yamls/distill.yaml {train_overrides(arguments.out)}")
    return conversion


def train_overrides(out: str) -> str:
    """Return what a training needs to read the result."""
    is_remote = "://" in out
    return shlex.quote(f"train_loader.remote={out}" if is_remote else f"train_loader.local={Path(out).resolve()}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("source", metavar="SOURCE", help="a folder of images")
    parser.add_argument("out", metavar="OUT", help="a folder, s3://bucket/prefix, gs://, …")
    parser.add_argument("--split", default="train", help="the split's folder; default: train")
    parser.add_argument("--labels", help="a file with the labels of a flat folder; none: no labels")
    parser.add_argument(
        "--resize", type=int, metavar="N", help="shrink the short side to N pixels; default: keep bytes"
    )
    parser.add_argument("--quality", type=int, default=90, help="of JPEGs encoded again; default: 90")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; default: one per core")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order; default: 0")
    parser.add_argument("--shard-size", type=size, default="64mb", help="approximate; default: 64mb")
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="skip and list images that are missing or corrupt"
    )
    arguments = parser.parse_args(argv)
    for name, largest in (("resize", 65500), ("quality", 100), ("workers", 1024), ("shard_size", 1 << 31)):
        value = getattr(arguments, name)
        if value is not None and not 1 <= value <= largest:
            raise InputError(f"--{name.replace('_', '-')}: must be 1 to {largest}, got {value}")
    if arguments.seed < 0:
        raise InputError(f"--seed: must be 0 or more, got {arguments.seed}")
    return arguments


def print_report(conversion: "Conversion", seconds: float) -> None:
    if conversion.resumed:
        print(f"resumed an interrupted conversion after {conversion.resumed} shards")
    classes = "no labels" if conversion.classes is None else f"{conversion.classes} classes"
    print(
        f"wrote {conversion.out}: {conversion.images} images, {classes}, {conversion.bytes / 1e6:.1f} MB in "
        f"{conversion.shards} shards, read back and verified, in {seconds:.0f} s"
    )
    converted, ignored = _counts(conversion.converted), _counts(conversion.ignored)
    print(f"converted to RGB JPEG: {converted}; other files: {ignored}")
    print(f"skipped as unreadable: {len(conversion.skipped) or 'none'}")
    for line in conversion.skipped:
        print(f"  {line}")
    if conversion.leftover:
        print(f"left by an earlier conversion, in no index, delete them by hand: {len(conversion.leftover)} shards")
        for name in conversion.leftover:
            print(f"  {conversion.out}/{name}")
    if conversion.leftover is None:
        print(f"left by an earlier conversion: unknown, {conversion.out} cannot be listed")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
