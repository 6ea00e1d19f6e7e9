"""Convert ImageNet, any folder of images, or CIFAR-10 to MDS shards.

    d2v convert-images /data/ILSVRC s3://bucket/imagenet/train --resize 256
    d2v convert-images /data/ILSVRC s3://bucket/imagenet/val --resize 256 --split val
    d2v convert-images photos datasets/photos --labels none --workers 8
    d2v convert-images 'laion/*.tar' s3://bucket/laion/train --skip-unreadable
    d2v convert-images hf://datasets/ORG/NAME datasets/birds/train --label-column label
    d2v convert-images cifar10:datasets datasets/cifar10/train
    d2v convert-images cifar10:datasets datasets/cifar10/test --split test

cifar10:FOLDER downloads CIFAR-10 to FOLDER if it is missing there; its pixels are unchanged.
For an S3-compatible store, set S3_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
An interrupted conversion leaves no index.json, so nothing reads it as a data set. The same command resumes it; with
other settings, the conversion starts over.
The images are in SOURCE/SPLIT or SOURCE, or in a single folder there that holds all of them, such as Kaggle's
ILSVRC/Data/CLS-LOC. In zips and in tars with folders, SPLIT is a folder; for Parquet files and other tars, it is a word
in the file's name, or else in its folders' names. Labels come from class folders, Kaggle's LOC_SPLIT_solution.csv, a
CSV file with lines 'image,class', or --label-column.
"""

import os
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2v_composer.commands.options import make_parser
from d2v_composer.system.command_line import d2v, print_next, print_skipped, training_on
from d2v_composer.system.processes import ALL

if TYPE_CHECKING:
    from d2v_composer.data.modality import Modality


def main(argv: Sequence[str]) -> Any:
    """Convert, print a report, and return the result; ``None`` if the part exists already."""
    arguments = make_parser(__doc__, "convert-images", sample="image").parse_args(argv)

    from d2v_composer.conversion.convert import IMAGES

    yaml = "cifar10" if arguments.source.startswith("cifar10:") else "distill"
    return convert_and_report(arguments, IMAGES, yaml, resize=arguments.resize, quality=arguments.quality)


def convert_and_report(arguments: Namespace, modality: "Modality", yaml: str, **options: Any) -> Any:
    """Convert, and print a report that names the YAML for the next step."""
    from d2v_composer.conversion.convert import convert, open_samples
    from d2v_composer.conversion.parts import Parts, plan_of
    from d2v_composer.models.configs import SAMPLE_RATE
    from d2v_composer.sources.source import hash_of, name_counts

    names, part, out = ("source", "split", "labels", "column", "label_column"), arguments.part, arguments.out
    source = open_samples(modality=modality, part=part or ALL, **{name: getattr(arguments, name) for name in names})
    start, plan = time.monotonic(), None
    if part:
        settings = {name: getattr(arguments, name) for name in ("seed", "shard_size", "label_column")} | options
        listed = os.path.isfile(arguments.labels or "") and Path(arguments.labels).read_bytes()
        labels = hash_of(source.label is None, source.class_names, listed)
        parts, plan = Parts(out), plan_of(source, part, labels=labels, **settings)
        if parts.has(part, plan):
            print(f"part {part.number} of {part.total} exists already")
            return None
        out = parts.path(part)
    print("other files:", name_counts(source.left_out))
    conversion = convert(
        source,
        out,
        plan=plan,
        seed=arguments.seed,
        workers=arguments.workers,
        shard_bytes=arguments.shard_size,
        skip_unreadable=arguments.skip_unreadable,
        **options,
    )
    if conversion.resumed:
        print(f"resumed an interrupted conversion after {conversion.resumed} shards")
    hours = f" ({sum(conversion.lengths) / SAMPLE_RATE / 3600:,.2f} hours)" if conversion.lengths else ""
    classes = f"{len(source.class_names)} classes" if source.class_names else "labels without names"
    classes = "no labels" if source.label is None else classes
    print(
        f"wrote {out}: {conversion.samples} {source.modality.unit}{hours}, {classes}, "
        f"{conversion.bytes / 1e6:.1f} MB in {conversion.shards} shards, in {time.monotonic() - start:.0f} s"
    )
    print_skipped(conversion.skipped)
    print_next(*((d2v("merge", arguments.out),) if part else training_on(out, yaml)))
    return conversion
