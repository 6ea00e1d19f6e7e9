"""ImageNet, or any folder of images, to MDS shards: ``python recipes/convert_imagenet.py SOURCE OUT``.

    python recipes/convert_imagenet.py /data/ILSVRC s3://bucket/imagenet/train --resize 256
    python recipes/convert_imagenet.py /data/ILSVRC s3://bucket/imagenet/val --resize 256 --split val

An S3-compatible store is set with S3_ENDPOINT_URL, its credentials with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
An interrupted conversion leaves no index.json, so no reader takes it for a data set; the same command again goes on
where it was. With other settings it starts over; what that leaves in an object store is named at the end, not removed.
Layouts and labels files: see find_images in d2v_composer/conversion/image_source.py.
"""

import argparse
import os
import time
from collections.abc import Sequence

from streaming.base.util import bytes_to_int

from d2v_composer.conversion.convert import Conversion, convert_images
from d2v_composer.conversion.image_source import find_images
from d2v_composer.conversion.shards import Encoding
from d2v_composer.system import cli
from d2v_composer.system.errors import InputError


def main(argv: Sequence[str]) -> Conversion:
    """Convert, verify, and print what was written and what was left out."""
    arguments = parse(argv)
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
    return conversion


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="a folder of images")
    parser.add_argument("out", metavar="OUT", help="a folder, s3://bucket/prefix, gs://, …")
    parser.add_argument("--split", default="train", help="the split's folder; default: train")
    parser.add_argument("--labels", help="a file with the labels of a flat folder; none: ignore classes")
    parser.add_argument("--resize", type=int, metavar="N", help="make longer short sides N pixels; default: bytes kept")
    parser.add_argument("--quality", type=int, default=90, help="of JPEGs encoded anew; default: 90")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; default: one a core")
    parser.add_argument("--seed", type=int, default=0, help="of the order; default: 0")
    parser.add_argument("--shard-size", type=bytes_to_int, default="64mb", help="about; default: 64mb")
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="leave out, and list, images that are absent or damaged"
    )
    arguments = parser.parse_args(argv)
    for name, largest in (("resize", 65500), ("quality", 100), ("workers", 1024), ("shard_size", 1 << 31)):
        value = getattr(arguments, name)
        if value is not None and not 1 <= value <= largest:
            raise InputError(f"--{name.replace('_', '-')}: must be 1 to {largest}, got {value}")
    if arguments.seed < 0:
        raise InputError(f"--seed: must be 0 or more, got {arguments.seed}")
    return arguments


def print_report(conversion: Conversion, seconds: float) -> None:
    if conversion.resumed:
        print(f"continued an interrupted conversion: {conversion.resumed} shards were there")
    classes = "no labels" if conversion.classes is None else f"{conversion.classes} classes"
    print(
        f"wrote {conversion.out}: {conversion.images} images, {classes}, {conversion.bytes / 1e6:.1f} MB in "
        f"{conversion.shards} shards, read back and found whole, in {seconds:.0f} s"
    )
    converted, ignored = _counts(conversion.converted), _counts(conversion.ignored)
    print(f"converted to RGB JPEG: {converted}; files that are no images: {ignored}")
    print(f"skipped as unreadable: {len(conversion.skipped) or 'none'}")
    for line in conversion.skipped:
        print(f"  {line}")
    if conversion.leftover:
        print(f"left from an earlier conversion, in no index, to be removed by hand: {len(conversion.leftover)} shards")
        for name in conversion.leftover:
            print(f"  {conversion.out}/{name}")
    if conversion.leftover is None:
        print(f"left from an earlier conversion: not known, {conversion.out} cannot be listed")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


if __name__ == "__main__":
    cli.run(main)
