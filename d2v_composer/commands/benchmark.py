"""Measure speed on this machine, ours beside others in one process, interleaved.

    d2v benchmark step --precision fp32
    d2v benchmark step --device cuda --size large --json step.json
    d2v benchmark data --images /data/ILSVRC/Data/CLS-LOC/train --workers 8
    d2v benchmark data --remote s3://BUCKET/benchmark
    d2v benchmark retrieval

step: images/s of a training step, beside a naive program.
data: images/s of the training data, beside torchvision's ImageFolder and litdata; --remote adds a store.
retrieval: queries/s of the neighbor search, beside a bare matrix product and faiss.
data and retrieval need `pip install -e '.[benchmark]'`.
"""

import argparse
import json
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2v_composer.system.command_line import make_parser
from d2v_composer.system.errors import InputError
from d2v_composer.system.files import write_atomically


def main(argv: Sequence[str]) -> None:
    """Run a benchmark, and print and write its result."""
    options = vars(parse(argv))
    name, out = options.pop("benchmark"), options.pop("json")

    import torch

    from d2v_composer.benchmarks.data import benchmark_data
    from d2v_composer.benchmarks.measure import format_result
    from d2v_composer.benchmarks.retrieval import benchmark_retrieval
    from d2v_composer.benchmarks.step import benchmark_step
    from d2v_composer.models.execution import find_missing, name_precision

    if name == "data":
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
            result = benchmark_data(Path(work), **options)
    else:
        device = options["device"] = options["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: torch finds no GPU on this machine")
        if name == "retrieval":
            if options["k"] > options["bank"]:
                raise InputError(f"--k: must be at most --bank {options['bank']}, got {options['k']}")
            result = benchmark_retrieval(**options)
        else:
            if options["compiles"] and (missing := find_missing()) is not None:
                raise InputError(f"torch.compile {missing}; install it, or use --no-compile")
            options["precision"] = name_precision(options["precision"], device == "cuda")
            options["batch_size"] = options["batch_size"] or (256 if device == "cuda" else 8)
            result = benchmark_step(**options, steps=10 if device == "cuda" else 1)
    command = shlex.join(["d2v", "benchmark", *argv])
    print(f"{command}\n{format_result(result)}")
    if out is not None:
        write_atomically(out, json.dumps({"command": command, **result}, indent=1) + "\n")


def parse(argv: Sequence[str]) -> Any:
    parser = make_parser(__doc__)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    step = benchmarks.add_parser("step", help="a training step")
    step.add_argument("--size", choices=("base", "large", "quickstart"), default="base", help="default: base")
    step.add_argument("--batch-size", type=positive, help="images a step; default: 8, on a GPU 256")
    step.add_argument("--precision", choices=("auto", "fp32", "amp_bf16", "amp_fp16"), default="auto")
    step.add_argument("--no-compile", dest="compiles", action="store_false", help="without torch.compile")

    data = benchmarks.add_parser("data", help="reading training images")
    data.add_argument("--images", type=Path, metavar="FOLDER", help="default: crops of scikit-image's photographs")
    data.add_argument("--num-images", type=positive, default=1000, help="default: 1000")
    data.add_argument("--workers", type=int, default=0, help="worker processes; default: 0, one process on one core")
    data.add_argument("--remote", metavar="ADDRESS", help="write shards to this empty address, and read them from it")

    retrieval = benchmarks.add_parser("retrieval", help="the search for nearest neighbors")
    for name, default in {"bank": 50_000, "queries": 10_000, "dim": 768, "k": 20}.items():
        retrieval.add_argument(f"--{name}", type=positive, default=default, help=f"default: {default}")

    for each in (step, retrieval):
        each.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if available")
    for each in (step, data, retrieval):
        each.add_argument("--repeats", dest="rounds", type=positive, default=5, help="measured passes; default: 5")
        each.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return int(text)
