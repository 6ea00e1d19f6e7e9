"""Measure speed on this machine, against others.

    d2v benchmark data                                          # four minutes on two cores
    d2v benchmark data --images /data/ILSVRC --workers 0 8 --json data.json
    d2v benchmark step --precision fp32
    d2v benchmark step --device cuda --size large --json step.json
    d2v benchmark step --teacher timm/vit_base_patch14_reg4_dinov2 --image-size 224
    d2v benchmark retrieval

``data``: images/s of our training data, from original JPEGs and from 256-px shards, on disk and in an S3 server that it
starts, against torchvision's ImageFolder, litdata and webdataset (``pip install -e '.[benchmark]'``).
``step``: images/s and memory of a training step, against a naive program, our savings added to it one by one; and the
share of the speed of matrix products on the same device.
``retrieval``: queries/s of the neighbor search against faiss and scikit-learn, images/s from CIFAR's size to the
model's input against PIL, and on a GPU the seconds of a whole evaluation.

All contenders run in one process, interleaved. The measurements are described in d2v_composer/benchmarks/.
"""

import argparse
import json
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from d2v_composer.benchmarks.step import SIZES
from d2v_composer.models.execution import find_missing
from d2v_composer.models.names import PrecisionChoice
from d2v_composer.system.command_line import make_parser
from d2v_composer.system.errors import InputError
from d2v_composer.system.files import check_out_file, write_atomically

if TYPE_CHECKING:
    from d2v_composer.benchmarks.measure import Result


CIFAR_IMAGES = 60_000


def main(argv: Sequence[str]) -> "Result":
    """Run a benchmark, and print and write its result."""
    arguments = parse(argv)
    if arguments.json is not None:
        if not arguments.json.parent.is_dir():
            raise InputError(f"--json: no such folder: {arguments.json.parent}")
        check_out_file(arguments.json)
    check_positive({"repeats": arguments.repeats})
    command = shlex.join(["d2v", "benchmark", *argv])
    result: Result = arguments.run(arguments)
    print(f"{command}\n{result.as_text()}")
    if arguments.json is not None:
        write_atomically(arguments.json, json.dumps({"command": command} | result.as_json(), indent=1) + "\n")
    return result


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(__doc__)
    benchmarks = parser.add_subparsers(required=True, metavar="BENCHMARK")
    data = benchmarks.add_parser("data", help="reading training images")
    data.add_argument(
        "--images", metavar="FOLDER", help="source of images; default: crops of scikit-image's photographs"
    )
    data.add_argument("--num-images", type=int, default=1000, help="default: 1000")
    data.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="numbers of processes; default: 0 2")
    data.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: on a core shared with other programs; --workers 0 only",
    )
    data.add_argument("--work", metavar="FOLDER", help="parent of the temporary folder; default: the system's")
    data.set_defaults(run=run_data)

    step = benchmarks.add_parser("step", help="a training step")
    step.add_argument("--batch-size", type=int, help="images a step; default: 8, on a GPU 256")
    step.add_argument("--steps", type=int, help="steps per measurement; default: 1, on a GPU 10")
    step.add_argument("--teacher", metavar="timm/NAME", help="a model of timm's instead of --size, random weights")
    step.add_argument("--image-size", metavar="PIXELS", help="of --teacher, or HEIGHTxWIDTH; default: timm's")
    step.add_argument("--no-compile", action="store_true", help="without torch.compile")
    step.set_defaults(run=run_step)

    retrieval = benchmarks.add_parser("retrieval", help="an evaluation")
    retrieval.add_argument("--bank", type=int, default=50_000, help="vectors; default: 50000")
    retrieval.add_argument("--queries", type=int, default=10_000, help="vectors; default: 10000")
    retrieval.add_argument("--dim", type=int, default=768, help="channels of a vector; default: 768")
    retrieval.add_argument("--k", type=int, default=20, help="neighbors; default: 20")
    retrieval.add_argument(
        "--evaluation-images", type=int, help="images of a whole evaluation; default: 0, on a GPU CIFAR's 60000"
    )
    retrieval.set_defaults(run=run_retrieval)

    for benchmark in (step, retrieval):
        benchmark.add_argument("--size", choices=SIZES, default="base", help="size of the teacher; default: base")
        benchmark.add_argument("--precision", choices=get_args(PrecisionChoice), default="auto", help="default: auto")
        benchmark.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if available")
    for benchmark in (data, step, retrieval):
        benchmark.add_argument("--repeats", type=int, default=5, help="passes of each contender; default: 5")
        benchmark.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    return parser.parse_args(argv)


def run_data(arguments: argparse.Namespace) -> "Result":
    from d2v_composer.benchmarks.data import FEWEST_IMAGES, benchmark_data

    if arguments.num_images < FEWEST_IMAGES:
        raise InputError(f"--num-images: must be {FEWEST_IMAGES} or more, got {arguments.num_images}")
    workers = list(dict.fromkeys(arguments.workers))
    if not all(0 <= number <= 64 for number in workers):
        raise InputError(f"--workers: must be 0 to 64, got {' '.join(map(str, workers))}")
    if arguments.clock == "cpu" and workers != [0]:
        raise InputError("--clock cpu: does not count worker processes; use --workers 0")
    if arguments.work is not None and not Path(arguments.work).is_dir():
        raise InputError(f"--work: no such folder: {arguments.work}")
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=arguments.work, ignore_cleanup_errors=True) as work:
        return benchmark_data(
            Path(work), arguments.images, arguments.num_images, workers, arguments.repeats, arguments.clock
        )


def run_step(arguments: argparse.Namespace) -> "Result":
    from d2v_composer.benchmarks.step import benchmark_step
    from d2v_composer.models.names import PREFIX

    device = choose_device(arguments)
    on_gpu = device == "cuda"
    batch_size = arguments.batch_size if arguments.batch_size is not None else 256 if on_gpu else 8
    steps = arguments.steps if arguments.steps is not None else 10 if on_gpu else 1
    check_positive({"batch-size": batch_size, "steps": steps})
    compiles = not arguments.no_compile
    if compiles and (missing := find_missing()) is not None:
        raise InputError(f"torch.compile {missing}; install it, or use --no-compile")
    if arguments.teacher is not None and not arguments.teacher.startswith(PREFIX):
        raise InputError(f"--teacher: must be timm/NAME, got {arguments.teacher!r}")
    if arguments.image_size is not None and arguments.teacher is None:
        raise InputError("--image-size: needs --teacher timm/NAME")
    return benchmark_step(
        arguments.teacher or arguments.size,
        device,
        arguments.precision,
        batch_size,
        steps,
        arguments.repeats,
        compiles=compiles,
        image_size=arguments.image_size,
    )


def run_retrieval(arguments: argparse.Namespace) -> "Result":
    from d2v_composer.benchmarks.retrieval import Setting, benchmark_retrieval

    device = choose_device(arguments)
    evaluation_images = arguments.evaluation_images
    if evaluation_images is None:
        evaluation_images = CIFAR_IMAGES if device == "cuda" else 0
    elif evaluation_images < 6:
        raise InputError(f"--evaluation-images: must be 6 or more, got {evaluation_images}")
    check_positive({"bank": arguments.bank, "queries": arguments.queries, "dim": arguments.dim, "k": arguments.k})
    if arguments.k > arguments.bank:
        raise InputError(f"--k: must be at most --bank {arguments.bank}, got {arguments.k}")
    return benchmark_retrieval(
        Setting(
            num_bank=arguments.bank,
            num_queries=arguments.queries,
            dim=arguments.dim,
            k=arguments.k,
            size=arguments.size,
            device=device,
            precision=arguments.precision,
            rounds=arguments.repeats,
            evaluation_images=evaluation_images,
        )
    )


def choose_device(arguments: argparse.Namespace) -> str:
    """Return the device asked for, or the best available, and name its precision in the arguments.

    Raises:
        InputError: The device is not available, or does not support the precision.
    """
    import torch

    from d2v_composer.models.execution import name_precision

    has_gpu = torch.cuda.is_available()
    device = arguments.device or ("cuda" if has_gpu else "cpu")
    if device == "cuda" and not has_gpu:
        raise InputError("--device cuda: torch finds no GPU on this machine")
    arguments.precision = name_precision(arguments.precision, on_gpu=device == "cuda")
    if arguments.precision == "amp_fp16" and device == "cpu":
        raise InputError("--precision amp_fp16: needs a GPU; allowed on a CPU: fp32, amp_bf16")
    return device


def check_positive(arguments: dict[str, int]) -> None:
    for name, value in arguments.items():
        if value < 1:
            raise InputError(f"--{name}: must be 1 or more, got {value}")
