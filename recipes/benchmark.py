"""How fast it is, measured here and against others: ``python recipes/benchmark.py data``.

    python recipes/benchmark.py data                                          # four minutes on two cores
    python recipes/benchmark.py data --images /data/ILSVRC --workers 0 8 --json data.json

``data``: images/s of our training data, from original JPEGs and from 256-px shards, on disk and from an S3 server
that it starts, beside torchvision's ImageFolder, litdata and webdataset (``pip install -e '.[benchmark]'``), in one
process, interleaved. How it measures: d2v_composer/benchmarks/data.py.
"""

import argparse
import json
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

from d2v_composer import cli
from d2v_composer.benchmarks.data import CLOCKS, FEWEST_IMAGES, DataBenchmark, benchmark_data, data_tables
from d2v_composer.errors import InputError


def main(argv: Sequence[str]) -> DataBenchmark:
    """Run the benchmark that the arguments name, and print and write what it found."""
    arguments = parse(argv)
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise InputError(f"--json: no such folder: {arguments.json.parent}")
    command = f"python {shlex.join(['recipes/benchmark.py', *argv])}"
    benchmark = run_data(arguments)
    print(f"{command}\n{data_tables(benchmark)}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"command": command} | benchmark.as_json(), indent=1) + "\n")
    return benchmark


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    data = benchmarks.add_parser("data", help="reading training images")
    data.add_argument("--images", metavar="FOLDER", help="to draw from; default: scikit-image's photographs and more")
    data.add_argument("--num-images", type=int, default=1000, help="default: 1000")
    data.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="numbers of processes; default: 0 2")
    data.add_argument("--repeats", type=int, default=5, help="passes of each contender; default: 5")
    data.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: where others use the core; --workers 0 only"
    )
    data.add_argument("--work", metavar="FOLDER", help="where a temporary folder is made; default: the system's place")
    data.add_argument("--json", type=Path, metavar="FILE", help="write it all there too")
    return parser.parse_args(argv)


def run_data(arguments: argparse.Namespace) -> DataBenchmark:
    if arguments.num_images < FEWEST_IMAGES:
        raise InputError(f"--num-images: must be {FEWEST_IMAGES} or more, got {arguments.num_images}")
    if arguments.repeats < 1:
        raise InputError(f"--repeats: must be 1 or more, got {arguments.repeats}")
    workers = list(dict.fromkeys(arguments.workers))
    if not all(0 <= number <= 64 for number in workers):
        raise InputError(f"--workers: must be 0 to 64, got {' '.join(map(str, workers))}")
    if arguments.clock == "cpu" and workers != [0]:
        raise InputError("--clock cpu: does not see worker processes; give --workers 0")
    if arguments.work is not None and not Path(arguments.work).is_dir():
        raise InputError(f"--work: no such folder: {arguments.work}")
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=arguments.work, ignore_cleanup_errors=True) as work:
        return benchmark_data(
            Path(work), arguments.images, arguments.num_images, workers, arguments.repeats, arguments.clock
        )


if __name__ == "__main__":
    cli.run(main)
