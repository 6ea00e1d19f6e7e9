"""Measure speed on this machine: our code and other programs, interleaved in one process.

    d2v benchmark step --precision fp32
    d2v benchmark step --size large --json step.json
    d2v benchmark step --loop trainer --only ours --batch-size 32 --trace trace.json
    d2v benchmark plan --batch-size 256
    d2v benchmark data --images /data/ILSVRC/Data/CLS-LOC/train --workers 8
    d2v benchmark data --remote s3://BUCKET/benchmark
    d2v benchmark retrieval
    d2v benchmark first-hour OUT

step: images/s of a training step, compared with a naive program.
plan: kernels and bytes of a compiled step on an H100, by Inductor's plan; needs no GPU.
data: images/s of the training data, compared with torchvision's ImageFolder; --remote adds a store.
retrieval: queries/s of the neighbor search, compared with a bare matrix product and faiss.
first-hour: all of these, and training runs, unattended, on a new GPU; OUT/first_hour.json has the results.
step and retrieval use the GPU if there is one; CUDA_VISIBLE_DEVICES= hides it.
data and retrieval need `pip install -e '.[benchmark]'`.
"""

import argparse
import json
import shlex
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from d2v_composer.models.configs import RELEASED
from d2v_composer.system.command_line import make_parser, whole
from d2v_composer.system.files import write_atomically

positive = whole(1, 1 << 31)

SIZE = (*RELEASED, "quickstart"), "default: base"
REPEATS = positive, "number of measured passes; default: 5"
# Benchmark → option → its type or choices, and its help. The benchmark's function has the defaults.
OPTIONS: dict[str, dict[str, tuple[Any, str]]] = {
    "step": {
        "--size": SIZE,
        "--batch-size": (positive, "images, or clips of 5 s, per step; default: 8, or 256 on a GPU"),
        "--precision": (("auto", "fp32", "amp_bf16", "amp_fp16"), "default: auto"),
        "--only": (("naive", "eager", "ours"), "measure only this contender"),
        "--loop": (("bare", "trainer"), "trainer: also measure 'ours' in Composer's Trainer, on batches in memory"),
        "--sdp": (
            ("flash_attention", "efficient_attention", "cudnn_attention", "math"),
            "the attention kernel to prefer; default: torch's choice",
        ),
        "--trace": (Path, "write a profile of the last contender to this file, for chrome://tracing or Perfetto"),
        "--repeats": REPEATS,
    },
    "plan": {
        "--size": SIZE,
        "--batch-size": (positive, "images, or clips of 5 s, per step; default: 256"),
        "--residual": (("full", "half"), "precision of the frozen blocks' residual stream; default: full"),
    },
    "data": {
        "--images": (Path, "folder with one subfolder per class; default: crops of scikit-image's photographs"),
        "--num-images": (positive, "default: 1000"),
        "--workers": (int, "worker processes; default: 0, one process on one core"),
        "--remote": (str, "an empty folder in a store, to write shards to and read them from"),
        "--repeats": REPEATS,
    },
    "retrieval": {
        "--bank": (positive, "number of vectors to search; default: 50000"),
        "--queries": (positive, "default: 10000"),
        "--dim": (positive, "default: 768"),
        "--k": (positive, "neighbors per query; default: 20"),
        "--repeats": REPEATS,
    },
    "first-hour": {},
}


def main(argv: Sequence[str]) -> None:
    """Run a benchmark, and print and write its result."""
    parser = make_parser(__doc__)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, own in OPTIONS.items():
        each = benchmarks.add_parser(name, argument_default=argparse.SUPPRESS)
        for option, (kind, about) in own.items():
            if isinstance(kind, tuple):
                each.add_argument(option, choices=kind, help=about)
            else:
                each.add_argument(option, type=kind, help=about)
        each.add_argument("--json", type=Path, help="file to write the result to, as JSON")
        if name == "first-hour":
            each.add_argument("out", metavar="OUT", type=Path, help="a new folder for results and runs")
        if name == "step":
            each.add_argument(
                "--no-compile", dest="compiles", action="store_false", help="measure without torch.compile"
            )
            about = "settings of distill.yaml for 'ours', such as half_residual=true compile=default"
            each.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=(), help=about)
    options = vars(parser.parse_args(argv))
    name, out = options.pop("benchmark"), options.pop("json", None)

    from d2v_composer.benchmarks import format_result

    module = import_module(f"d2v_composer.benchmarks.{name.replace('-', '_')}")
    result = module.benchmark(**options)
    command = shlex.join(["d2v", "benchmark", *argv])
    print(f"{command}\n{getattr(module, 'format_result', format_result)(result)}")
    if out is not None:
        write_atomically(out, json.dumps({"command": command, **result}, indent=1) + "\n")
