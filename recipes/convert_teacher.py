"""fairseq checkpoint to one safe file: ``python recipes/convert_teacher.py IN.pt OUT.safetensors``."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from d2v_composer.checkpoints.load import Conversion, convert_teacher
from d2v_composer.system import cli


def main(argv: Sequence[str]) -> Conversion:
    """Convert, and print which of the file's tensors are used and which are left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", metavar="IN.pt", help="a path, https://, s3://, …")
    parser.add_argument("out", metavar="OUT.safetensors", type=Path)
    parser.add_argument("--weights", choices=("model", "ema"), default="model")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="as stored")
    parser.add_argument("--licence", help="a note on the weights' licence, kept in the file")
    arguments = parser.parse_args(argv)
    dtype = getattr(torch, arguments.dtype)
    conversion = convert_teacher(arguments.source, arguments.out, arguments.weights, dtype, arguments.licence)
    print_report(conversion, arguments.out)
    return conversion


def print_report(conversion: Conversion, out: Path) -> None:
    config, provenance = conversion.config, conversion.provenance
    print(f"{provenance['source']} (sha256 {provenance['sha256']})")
    print(
        f"data2vec 2.0 image model: width {config.embed_dim}, {config.num_heads} heads, {config.prenet_depth} + "
        f"{config.depth} blocks, {config.image_size} px in patches of {config.patch_size}"
    )
    for verb, names in (("used", conversion.used), ("left", conversion.left)):
        print(f"{verb} {len(names)} tensors")
        for group, count in Counter(name.rsplit(".", 1)[0] for name in names).items():
            print(f"  {group} ({count})")
    print(f"wrote {out}: {provenance['weights']} weights, {provenance['dtype']}, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    cli.run(main)
