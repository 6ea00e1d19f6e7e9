"""Measure speed on this machine, ours beside others in one process, interleaved.

    d2v benchmark step --precision fp32
    d2v benchmark step --device cuda --size large --json step.json
    d2v benchmark step --teacher timm/vit_base_patch14_reg4_dinov2 --image-size 224
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
from typing import TYPE_CHECKING, Any

from d2v_composer.system.command_line import make_parser
from d2v_composer.system.errors import InputError
from d2v_composer.system.files import check_out_file, write_atomically

if TYPE_CHECKING:
    from d2v_composer.benchmarks.measure import Result


def main(argv: Sequence[str]) -> "Result":
    """Run a benchmark, and print and write its result."""
    arguments = parse(argv)
    if arguments.json is not None:
        check_out_file(arguments.json)

    import torch

    from d2v_composer.benchmarks.data import benchmark_data
    from d2v_composer.benchmarks.retrieval import benchmark_retrieval
    from d2v_composer.benchmarks.step import benchmark_step

    options = vars(arguments).copy()
    name, out = options.pop("benchmark"), options.pop("json")
    if "device" in options:
        options["device"] = options["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
        if options["device"] == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: torch finds no GPU on this machine")
    if name == "step":
        result = benchmark_step(**complete_step(options))
    elif name == "retrieval":
        if arguments.k > arguments.num_bank:
            raise InputError(f"--k: must be at most --bank {arguments.num_bank}, got {arguments.k}")
        result = benchmark_retrieval(**options)
    else:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
            result = benchmark_data(Path(work), **options)
    command = shlex.join(["d2v", "benchmark", *argv])
    print(f"{command}\n{result.as_text()}")
    if out is not None:
        write_atomically(out, json.dumps({"command": command} | result.as_json(), indent=1) + "\n")
    return result


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(__doc__)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    step = benchmarks.add_parser("step", help="a training step")
    step.add_argument("--size", choices=("base", "large", "quickstart"), default="base", help="default: base")
    step.add_argument("--teacher", metavar="timm/NAME", help="a timm model with random weights instead of --size")
    step.add_argument("--image-size", metavar="PIXELS", help="of --teacher, or HEIGHTxWIDTH; default: timm's")
    step.add_argument("--batch-size", type=positive, help="images a step; default: 8, on a GPU 256")
    step.add_argument("--steps", type=positive, help="steps a pass; default: 1, on a GPU 10")
    step.add_argument("--precision", choices=("auto", "fp32", "amp_bf16", "amp_fp16"), default="auto")
    step.add_argument("--no-compile", dest="compiles", action="store_false", help="without torch.compile")

    data = benchmarks.add_parser("data", help="reading training images")
    data.add_argument("--images", type=Path, metavar="FOLDER", help="default: crops of scikit-image's photographs")
    data.add_argument("--num-images", type=positive, default=1000, help="default: 1000")
    data.add_argument("--workers", type=int, default=0, help="worker processes; default: 0, one process on one core")
    data.add_argument("--remote", metavar="ADDRESS", help="write shards to this empty address, and read them from it")

    retrieval = benchmarks.add_parser("retrieval", help="the search for nearest neighbors")
    retrieval.add_argument("--bank", dest="num_bank", type=positive, default=50_000, help="vectors; default: 50000")
    retrieval.add_argument("--queries", dest="num_queries", type=positive, default=10_000, help="default: 10000")
    retrieval.add_argument("--dim", type=positive, default=768, help="channels of a vector; default: 768")
    retrieval.add_argument("--k", type=positive, default=20, help="neighbors; default: 20")

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


def complete_step(options: dict[str, Any]) -> dict[str, Any]:
    """Check the options of ``step`` and fill in what depends on the device.

    Raises:
        InputError: Two options contradict each other, or this machine cannot run them.
    """
    from d2v_composer.models.execution import find_missing, name_precision

    on_gpu, teacher = options["device"] == "cuda", options.pop("teacher")
    if options["compiles"] and (missing := find_missing()) is not None:
        raise InputError(f"torch.compile {missing}; install it, or use --no-compile")
    if teacher is not None and not teacher.startswith("timm/"):
        raise InputError(f"--teacher: must be timm/NAME, got {teacher!r}")
    if teacher is None and options["image_size"] is not None:
        raise InputError("--image-size: needs --teacher timm/NAME")
    if options["precision"] == "amp_fp16" and not on_gpu:
        raise InputError("--precision amp_fp16: needs a GPU; a CPU has fp32 and amp_bf16")
    defaults = {"batch_size": 256 if on_gpu else 8, "steps": 10 if on_gpu else 1}
    return options | {
        "size": teacher or options["size"],
        "precision": name_precision(options["precision"], on_gpu),
        **{key: options[key] or default for key, default in defaults.items()},
    }
