"""Make the parser of a command, with the options that options.yaml has for it."""

import os
from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path
from typing import Any, get_args

import yaml

from d2v_composer.models.names import RAW_EMBEDDINGS, TIMM_PREFIX, Pooling, PrecisionChoice, Representation, Weights
from d2v_composer.sources import COLUMN, IDS, LABEL_COLUMN, SOURCES
from d2v_composer.system import command_line
from d2v_composer.system.addresses import place_to_write
from d2v_composer.system.command_line import size, whole
from d2v_composer.system.processes import Part, local_ranks


def absolute(place: str) -> str:
    """Return an address or timm/NAME unchanged, and a local path as an absolute path."""
    return place if "://" in place or place.startswith(TIMM_PREFIX) else os.path.abspath(os.path.expanduser(place))


def place(text: str) -> str:
    """Return an argument that a command writes; see :func:`place_to_write`."""
    try:
        return place_to_write(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


CORES = max(1, (os.cpu_count() or 1) // local_ranks())
"""This rank's share of the machine's cores."""


def choose_workers(asked: int | None, device: str) -> int:
    """Return the number of processes that decode samples; by default, ``CORES`` for a GPU and none for a CPU."""
    return (CORES if device == "cuda" else 0) if asked is None else asked


# What a name in the file stands for.
NAMED: dict[str, Any] = {
    "absolute": absolute,
    "cores": CORES,
    "float": float,
    "int": int,
    "part": Part.parse,
    "path": Path,
    "place": place,
    "place_here": lambda text: Path(place(text)),
    "size": size,
    "Pooling": get_args(Pooling),
    "RAW_EMBEDDINGS": RAW_EMBEDDINGS,
    "PrecisionChoice": get_args(PrecisionChoice),
    "Representation": get_args(Representation),
    "Weights": get_args(Weights),
}
OPTIONS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
TEXTS = {"COLUMN": COLUMN, "IDS": IDS, "LABEL_COLUMN": LABEL_COLUMN, "SOURCES": SOURCES}


def make_parser(about: str | None, command: str, **named: Any) -> ArgumentParser:
    """Return a command's parser with its options. ``--help`` shows ``about``, the command's docstring."""
    parser = command_line.make_parser(about)
    add_options(parser, command, **named)
    return parser


def add_options(parser: ArgumentParser, command: str, **named: Any) -> None:
    """Add a command's options to a parser; ``named`` gives values to further words in options.yaml."""
    words = NAMED | named
    groups: dict[str, Any] = {"": parser}
    for option, given in OPTIONS[command].items():
        arguments = dict(given)
        about, group, kind = (arguments.pop(key, "") for key in ("help", "group", "type"))
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        if kind:
            arguments["type"] = whole(*kind) if isinstance(kind, list) else words[kind]
        for key in ("choices", "default"):
            if isinstance(value := arguments.get(key), str):
                arguments[key] = words.get(value, value)
        groups[group].add_argument(option, help=about.format(**TEXTS, **named), **arguments)
