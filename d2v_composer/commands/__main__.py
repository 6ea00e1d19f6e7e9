"""Distill vision and audio transformers into small students.

usage: d2v COMMAND [arguments]; d2v COMMAND --help shows the arguments; d2v --version
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import d2v_composer
from d2v_composer.system import command_line
from d2v_composer.system.errors import InputError

COMMANDS = {
    "distill": "distill a student from images or audio clips, in one command",
    "train": "distill a student with the settings in a YAML",
    "init": "print a YAML to start from",
    "convert-teacher": "convert a fairseq checkpoint to a safetensors file",
    "random-teacher": "write a teacher with random weights, for trials and benchmarks",
    "convert-images": "convert images to MDS shards, in a folder or an object store",
    "convert-audio": "convert audio to MDS shards, in a folder or an object store",
    "fields": "print the fields of the YAMLs, with defaults and descriptions",
    "report": "write a run's curves and tables to one HTML page",
    "evaluate": "compare a model with its teacher and baselines",
    "export": "export a student to a .safetensors, .onnx or .pt2 file",
    "embed": "embed a collection of images or audio clips",
    "search": "find the samples in an index that are nearest to a query, or near-duplicates",
    "align": "map a student's embeddings to the space of an index or of another model",
    "merge": "merge the parts of a conversion or of embeddings",
}


def main(argv: Sequence[str]) -> Any:
    """Run the command that the first word of ``argv`` names, and return the command's result."""
    name, *rest = argv or ["--help"]
    if name in COMMANDS:
        sys.argv = [f"d2v {name}", *rest]  # argparse takes the program's name from it
        return import_module(f"d2v_composer.commands.{name.replace('-', '_')}").main(rest)
    if name == "--version":
        return print(f"d2v-composer {d2v_composer.__version__}")
    commands = "\n".join(f"  {name:<18}{what}" for name, what in COMMANDS.items())
    command_line.show_help([name], f"{__doc__}\n{commands}")

    from d2v_composer.config.types import suggest  # a fifth of a second

    raise InputError(f"d2v {name}: no such command{suggest(name, [*COMMANDS])}")


def run() -> NoReturn:
    """Run the console script."""
    command_line.run(main)


if __name__ == "__main__":
    run()
