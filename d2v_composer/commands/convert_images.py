"""Convert ImageNet, any folder of images, or CIFAR-10 to MDS shards.

    d2v convert-images /data/ILSVRC s3://bucket/imagenet/train --resize 256
    d2v convert-images /data/ILSVRC s3://bucket/imagenet/val --resize 256 --split val
    d2v convert-images photos datasets/photos --labels none --workers 8
    d2v convert-images cifar10:datasets datasets/cifar10/train
    d2v convert-images cifar10:datasets datasets/cifar10/test --split test

cifar10:FOLDER downloads CIFAR-10 to FOLDER if it is missing there; its pixels are unchanged.
For an S3-compatible store, set S3_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
An interrupted conversion leaves no index.json, so no reader takes it for a data set. Run the same command again to
resume it; with other settings it starts over.
The images are in SOURCE/SPLIT, SOURCE/ILSVRC/Data/CLS-LOC/SPLIT (Kaggle's archive) or SOURCE. Labels come from class
folders, Kaggle's LOC_SPLIT_solution.csv, or a CSV file with lines 'image,class'.
"""

import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from d2v_composer.system.command_line import make_parser, print_next, size, whole

if TYPE_CHECKING:
    from d2v_composer.data.convert import Conversion


def main(argv: Sequence[str]) -> "Conversion":
    """Convert, and print a report."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a folder of images, or cifar10:FOLDER")
    add("out", metavar="OUT", help="a folder, s3://bucket/prefix, gs://, …")
    add("--split", default="train", help="the split's folder; default: train")
    add("--labels", help="a CSV file with lines 'image,class', or none for no labels")
    add("--resize", type=whole(1, 65500), metavar="N", help="shrink the short side to N pixels; default: no change")
    add("--quality", type=whole(1, 100), default=90, help="quality of re-encoded JPEGs; default: 90")
    add("--workers", type=whole(1, 1024), default=os.cpu_count() or 1, help="worker processes; default: one per core")
    add("--seed", type=whole(0, 1 << 32), default=0, help="seed for the order of the images; default: 0")
    add("--shard-size", type=size, default="64mb", help="approximate size of a shard; default: 64mb")
    add("--skip-unreadable", action="store_true", help="skip images that are missing or corrupt, and list them")
    arguments = parser.parse_args(argv)

    from d2v_composer.data.convert import convert_images, find_images

    start = time.monotonic()
    source = find_images(arguments.source, arguments.split, arguments.labels)
    conversion = convert_images(
        source,
        arguments.out,
        resize=arguments.resize,
        quality=arguments.quality,
        seed=arguments.seed,
        workers=arguments.workers,
        shard_bytes=arguments.shard_size,
        skip_unreadable=arguments.skip_unreadable,
    )
    if conversion.resumed:
        print(f"resumed an interrupted conversion after {conversion.resumed} shards")
    classes = "no labels" if source.classes is None else f"{len(source.classes)} classes"
    print(
        f"wrote {arguments.out}: {conversion.images} images, {classes}, {conversion.bytes / 1e6:.1f} MB in "
        f"{conversion.shards} shards, in {time.monotonic() - start:.0f} s"
    )
    print("other files:", ", ".join(f"{count} {name}" for name, count in source.ignored.items()) or "none")
    print("\n  ".join([f"skipped as unreadable: {len(conversion.skipped) or 'none'}", *conversion.skipped]))
    out = arguments.out
    data = f"train_loader.remote={out}" if "://" in out else f"train_loader.local={Path(out).resolve()}"
    name = "cifar10" if arguments.source.startswith("cifar10:") else "distill"
    print_next(f"composer recipes/train.py yamls/{name}.yaml {shlex.quote(data)}")
    return conversion
