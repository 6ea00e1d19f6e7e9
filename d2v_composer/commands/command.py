"""The base class of commands, and types of arguments."""

import os
import sys
from argparse import SUPPRESS, Action, ArgumentError, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Collection, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from typing_extensions import Self

from d2v_composer.models.names import RAW_EMBEDDINGS, TIMM_PREFIX
from d2v_composer.sources import COLUMN, SOURCES, listed
from d2v_composer.system.addresses import place_to_write
from d2v_composer.system.errors import InputError
from d2v_composer.system.processes import Part, local_ranks

T = TypeVar("T")
CORES = max(1, (os.cpu_count() or 1) // local_ranks())
"""Number of CPU cores for each rank on this machine, at least 1."""
Positional = Annotated[T, "positional"]
"""``Positional[T]`` is the type of an argument without a flag; a tuple takes all remaining words."""


class Command(BaseModel):
    """A command, whose fields are its arguments: options, unless their type is :data:`Positional`.

    An option of type ``bool`` is a flag without a value; an option whose type is a tuple may be repeated.
    """

    # Validators are built when a value is checked, not for --help.
    model_config = ConfigDict(use_attribute_docstrings=True, validate_default=True, extra="forbid", defer_build=True)

    def run(self) -> Any:
        """Run the command, and return its result."""
        raise NotImplementedError

    @classmethod
    def main(cls, argv: Sequence[str]) -> Any:
        """Parse a command line, run the command and return its result."""
        return cls.parse(argv).run()

    @classmethod
    def parse(cls, argv: Sequence[str], program: str | None = None) -> Self:
        """Parse a command line; ``--help`` prints the docstring of the command's module and the arguments, and exits.

        Args:
            argv: The words after the command's name.
            program: The command's name in the help; default: the name in ``sys.argv[0]``.

        Raises:
            InputError: Arguments are unknown, missing or wrong.
        """
        about = sys.modules[cls.__module__].__doc__
        parser = _Parser(program, None, about, formatter_class=RawDescriptionHelpFormatter, argument_default=SUPPRESS)
        actions = cls.add_arguments(parser)
        flags = [flag for action in actions.values() for flag in action.option_strings]
        given = [word.partition("=")[0] for word in takewhile("--".__ne__, argv) if word.startswith("--")]
        # argparse takes a flag's first letters, too.
        if unknown := [word for word in given if not any(flag.startswith(word) for flag in ("--help", *flags))]:
            from d2v_composer.config.types import suggest  # a fifth of a second

            raise InputError(*(f"{word}: no such option{suggest(word, flags)}" for word in unknown))
        try:
            return cls.model_validate(vars(parser.parse_intermixed_args(argv)))
        except ValidationError as error:
            from d2v_composer.config.types import describe_problem

            problems = [(actions[str(problem["loc"][0])], describe_problem(problem)) for problem in error.errors()]
            raise InputError(*(str(ArgumentError(*problem)) for problem in problems)) from error

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> dict[str, Action]:
        """Add the arguments to a parser, and return argparse's action for each name."""
        actions = {}
        for key, field in cls.model_fields.items():
            name, kinds = field.alias or key, [*_kinds_in(field.annotation)]
            choices = [",".join(get_args(kind)) for kind in kinds if get_origin(kind) is Literal]
            metavar = f"{{{choices[0]}}}" if choices else name.upper()
            is_list, is_needed = any(get_origin(kind) is tuple for kind in kinds), field.is_required()
            flag = f"--{name.replace('_', '-')}"
            options: dict[str, Any] = {"required": is_needed, "action": "append" if is_list else "store"}
            if "positional" in field.metadata:
                flag = name
                options = {"nargs": "*" if is_list else None if is_needed else "?"}
            options = {"action": "store_true"} if bool in kinds else options | {"metavar": metavar}
            actions[name] = parser.add_argument(flag, help=_describe(field), **options)
        return actions


def _kinds_in(annotation: object) -> Iterator[object]:
    yield annotation
    for inner in get_args(annotation):
        yield from _kinds_in(inner)


def _describe(field: FieldInfo) -> str:
    text = " ".join((field.description or "").split()).rstrip(".").replace("``", "").replace("null: ", "default: ")
    shows_default = isinstance(field.default, str | int | float | Path) and not isinstance(field.default, bool)
    return f"{text}; default: {field.default}" if shows_default and "default: " not in text else text


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)  # one line, without the usage


def whole(smallest: int, largest: int) -> BeforeValidator:
    """Return a validator of whole numbers from ``smallest`` to ``largest``, both included."""

    def check(value: Any) -> Any:
        if not (str(value).isdecimal() and smallest <= int(value) <= largest):
            raise ValueError(f"must be a whole number from {smallest} to {largest}, got {value!r}")
        return value

    return BeforeValidator(check)


def one_of(allowed: Collection[str]) -> AfterValidator:
    """Return a validator that accepts only the ``allowed`` names."""

    def check(name: str) -> str:
        if name not in allowed:
            from d2v_composer.config.types import suggest

            raise ValueError(f"no such name {name!r}{suggest(name, [*allowed])}")
        return name

    return AfterValidator(check)


def _absolute(place: str) -> str:
    return place if "://" in place or place.startswith(TIMM_PREFIX) else os.path.abspath(os.path.expanduser(place))


def _given(text: str) -> str:
    if not text:  # an unset variable of the shell: as a path, it would be the current folder
        raise ValueError("must not be empty")
    return text


def choose_workers(asked: int | None, device: str) -> int:
    """Return the number of decoding processes: ``asked`` or, if it is ``None``, ``CORES`` on cuda and 0 on cpu."""
    return (CORES if device == "cuda" else 0) if asked is None else asked


# Not min_length, because with it pydantic refuses a name that is no UTF-8.
IS_GIVEN = AfterValidator(_given)
# Keeps an address or timm/NAME, and makes a local path absolute.
IS_ABSOLUTE = AfterValidator(_absolute)
# What a command writes, here or in a store; or only here.
Place = Annotated[str, AfterValidator(place_to_write)]
PlaceHere = Annotated[Path, BeforeValidator(lambda place: Path(place_to_write(place)))]
PartText = Annotated[Part, BeforeValidator(lambda part: Part.parse(part) if isinstance(part, str) else part)]
# Arguments that several commands have.
Column = Annotated[str | None, Field(description=COLUMN)]
Decoders = Annotated[
    Annotated[int, whole(0, 1024)] | None,
    Field(
        description="Number of processes that decode samples; 0: the main process decodes, as it always does on "
        "macOS and Windows; default: one process per core if there is a GPU, else 0."
    ),
]
Embedding = Annotated[
    Annotated[str, one_of(RAW_EMBEDDINGS)] | None,
    Field(
        description=f"The teacher's embedding, named by representation and pooling: {listed(RAW_EMBEDDINGS)}; default: "
        "the model's default."
    ),
]
PartOfWork = Annotated[
    PartText | None,
    Field(description="I/N: make only part I, counted from 0, of N parts; d2v merge OUT joins the parts."),
]
Samples = Annotated[Positional[str], IS_GIVEN, Field(description=f"A folder of images or audio files, {SOURCES}.")]
