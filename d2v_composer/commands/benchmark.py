"""Measure the speed of d2v-composer and of other programs on this machine.

usage: d2v benchmark {step,data,retrieval} [options]

    d2v benchmark step --precision fp32
    d2v benchmark step --size large --json step.json
    d2v benchmark step --loop trainer --only ours --batch-size 32 --trace trace.json
    d2v benchmark data --images /data/ILSVRC/Data/CLS-LOC/train --workers 8
    d2v benchmark data --remote s3://BUCKET/benchmark
    d2v benchmark retrieval

step: images or clips per second in training, compared with a naive program.
data: images per second from d2v-composer's training loader, compared with torchvision's ImageFolder.
retrieval: queries per second of the neighbor search, compared with a bare matrix product, and with faiss on the CPU.
With --remote, data also measures shards in a store, after a first epoch has cached them on this machine.
step and retrieval use the GPU if there is one; CUDA_VISIBLE_DEVICES= hides the GPU.
data and retrieval need `pip install -e '.[benchmark]'`.
"""

import json
import shlex
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from d2v_composer.commands.command import Command, PlaceHere, Positional, one_of, whole
from d2v_composer.config.types import suggest
from d2v_composer.models.configs import RELEASED
from d2v_composer.models.names import PrecisionChoice
from d2v_composer.system.command_line import show_help
from d2v_composer.system.errors import InputError
from d2v_composer.system.files import write_atomically

SIZES = (*RELEASED, "quickstart")
Number = Annotated[int, whole(1, 0x80000000)]


class Benchmark(Command):
    repeats: Number = 5
    """Number of measured passes of each program."""
    report: PlaceHere | None = Field(None, alias="json")
    """JSON file to write the result to."""

    def run(self) -> dict[str, Any]:
        """Run the benchmark, and return the rates of the programs and the setting."""
        module = import_module(f"d2v_composer.benchmarks.{type(self).__name__.lower()}")
        return module.benchmark(**self.model_dump(exclude={"report"}))


class Step(Benchmark):
    size: Annotated[str, one_of(SIZES)] = Field("base", description=f"Size of teacher and student: {', '.join(SIZES)}.")
    batch_size: Number | None = None
    """Number of images, or of 5 s clips, in a step; default: 8 on a CPU, 256 on a GPU."""
    precision: PrecisionChoice = "auto"
    """Precision of the step."""
    only: Literal["naive", "eager", "ours"] | None = None
    """Program to measure alone. naive: without optimizations; eager: d2v-composer without torch.compile; ours:
    d2v-composer."""
    loop: Literal["bare", "trainer"] = "bare"
    """trainer: also measure d2v-composer in Composer's Trainer, on batches in memory."""
    trace: PlaceHere | None = None
    """File to write a profile of three steps to, for chrome://tracing or Perfetto. A file with the same
    name and the suffix .txt has the totals."""
    no_compile: bool = False
    """Do not use torch.compile."""
    overrides: Positional[tuple[str, ...]] = ()
    """Settings of distill.yaml to change, each as key=value, such as compile=default."""


class Data(Benchmark):
    images: Path | None = None
    """Folder of images, with a subfolder for each class; default: crops of scikit-image's photographs."""
    num_images: Number = 1000
    """Maximum number of images to read."""
    workers: int = 0
    """Number of worker processes; 0: the main process reads, on one core."""
    remote: str | None = None
    """Address of an empty folder in a store, to write shards to; the loader is also measured on these shards, after a
    first epoch has cached them."""


class Retrieval(Benchmark):
    bank: Number = 50_000
    """Number of vectors to search."""
    queries: Number = 10_000
    """Number of vectors whose neighbors are searched."""
    dim: Number = 768
    """Number of dimensions of a vector."""
    k: Number = 20
    """Number of neighbors that are found for each query."""


BENCHMARKS = {kind.__name__.lower(): kind for kind in (Step, Data, Retrieval)}


def main(argv: Sequence[str]) -> None:
    """Run a benchmark, print its result and, with --json, write the result to a file."""
    show_help(argv[:1], __doc__)
    name, *rest = argv or [""]
    if not name:
        raise InputError(f"BENCHMARK is missing (allowed: {', '.join(BENCHMARKS)})")
    if name not in BENCHMARKS:
        raise InputError(f"BENCHMARK: no such benchmark {name!r}{suggest(name, [*BENCHMARKS])}")
    options = BENCHMARKS[name].parse(rest, f"d2v benchmark {name}")

    from d2v_composer.benchmarks import format_result

    result, command = options.run(), shlex.join(["d2v", "benchmark", *argv])
    print(f"{command}\n{format_result(result)}")
    if options.report is not None:
        write_atomically(options.report, json.dumps({"command": command, **result}, indent=1) + "\n")
