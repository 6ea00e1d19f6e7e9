"""Measure speed on this machine: our code and other programs, interleaved in one process.

    d2v benchmark step --precision fp32
    d2v benchmark step --size large --json step.json
    d2v benchmark step --loop trainer --only ours --batch-size 32 --trace trace.json
    d2v benchmark data --images /data/ILSVRC/Data/CLS-LOC/train --workers 8
    d2v benchmark data --remote s3://BUCKET/benchmark
    d2v benchmark retrieval

step: images/s of a training step, compared with a naive program.
data: images/s of the training data, compared with torchvision's ImageFolder; --remote adds a store.
retrieval: queries/s of the neighbor search, compared with a bare matmul and faiss.
step and retrieval use the GPU if there is one; CUDA_VISIBLE_DEVICES= hides it.
data and retrieval need `pip install -e '.[benchmark]'`.
"""

import argparse
import json
import shlex
from collections.abc import Sequence
from importlib import import_module

from d2v_composer.commands.options import add_options
from d2v_composer.models.configs import RELEASED
from d2v_composer.system.command_line import make_parser
from d2v_composer.system.files import write_atomically


def main(argv: Sequence[str]) -> None:
    """Run a benchmark, and print and write its result."""
    parser = make_parser(__doc__)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name in ("step", "data", "retrieval"):
        benchmark = benchmarks.add_parser(name, argument_default=argparse.SUPPRESS)
        add_options(benchmark, f"benchmark {name}", sizes=(*RELEASED, "quickstart"))
    options = vars(parser.parse_args(argv))
    name, out = options.pop("benchmark"), options.pop("json", None)

    from d2v_composer.benchmarks import format_result

    module = import_module(f"d2v_composer.benchmarks.{name}")
    result = module.benchmark(**options)
    command = shlex.join(["d2v", "benchmark", *argv])
    print(f"{command}\n{format_result(result)}")
    if out is not None:
        write_atomically(out, json.dumps({"command": command, **result}, indent=1) + "\n")
