"""Types of a YAML's fields, with their limits and checks."""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from os.path import abspath, exists, expanduser
from pkgutil import resolve_name
from typing import Annotated, Any

from pydantic import AfterValidator, Field, JsonValue
from pydantic_core import ErrorDetails

from d2v_composer.models.configs import parse_image_size
from d2v_composer.models.names import CALLBACKS_GROUP, DATA2VEC2, PACKAGE_PREFIX, TIMM_PREFIX
from d2v_composer.models.provenance import Record
from d2v_composer.system.addresses import Address, check_path
from d2v_composer.system.entry_points import find_entry_point
from d2v_composer.system.errors import errors_of

# Also the largest seed: ranks and epochs add to it, and numpy's seeds end at 2^32.
MAX_INT = (1 << 31) - 1
# Where pydantic's words do not tell what a YAML needs.
MESSAGES = {
    "missing": "is required",
    "string_type": "must be text, in quotes if it is a number",
    "byte_size": "must be a number of bytes, or a size such as '100gb'",
    "byte_size_unit": "must be a number of bytes, or a size such as '100gb'",
    "dict_type": "must be a section of keys and values",
    "model_type": "must be a section of keys and values",
}


def suggest(name: str, allowed: Sequence[str]) -> str:
    """Return the end of a message about an unknown name, with a similar allowed name and all allowed names."""
    nearest = difflib.get_close_matches(name, allowed, n=1)
    return f"{f'; did you mean {nearest[0]}?' if nearest else ''} (allowed: {', '.join(allowed) or 'none'})"


def describe_problem(error: ErrorDetails) -> str:
    """Return the text of an error that pydantic found, which may have several lines."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])  # pyright: ignore[reportTypedDictNotRequiredAccess]
    problem, value = MESSAGES.get(error["type"]) or re.sub(r"^\w+ should", "must", error["msg"]), error["input"]
    return problem if error["type"] == "missing" else f"{problem}, got {'null' if value is None else repr(value)}"


def checked(check: Callable[[Any], object]) -> AfterValidator:
    """Return a validator that calls ``check``, a function that raises ValueError for a wrong value."""

    def validate(value: Any) -> Any:
        check(value)
        return value

    return AfterValidator(validate)


def must(rule: str, holds: Callable[[Any], object]) -> AfterValidator:
    """Return a validator that raises ValueError('must RULE, got VALUE') unless ``holds(value)``."""

    def validate(value: Any) -> Any:
        if not holds(value):
            raise ValueError(f"must {rule}, got {value!r}")
        return value

    return AfterValidator(validate)


def duration(pattern: str, example: str) -> AfterValidator:
    """Return a validator of Composer time strings that must match a regular expression; the error shows ``example``."""
    return must(f"be a duration such as {example}", re.compile(pattern).fullmatch)


def read_image_size(size: object) -> int | str:
    """Return an image size as a number, if it is square, or as 'HEIGHTxWIDTH'."""
    parsed = parse_image_size(size)
    return parsed if isinstance(parsed, int) else "x".join(map(str, parsed))


def check_file(address: str) -> None:
    """Raise ValueError if a local path has no file, or characters that Composer does not accept."""
    from d2v_composer.system.fetch import find_missing_file  # torch takes seconds to import

    if not Address.parse(address).is_remote:
        check_path(address)
    if (missing := find_missing_file(address)) is not None:
        raise ValueError(f"{address}: {missing}")


def class_path(name: str, known: Mapping[str, str]) -> Any:
    """Return 'module:class' of a callback or logger; ``None`` if no callback or logger has the name."""
    if name.startswith(PACKAGE_PREFIX):
        entry = find_entry_point(CALLBACKS_GROUP, name.removeprefix(PACKAGE_PREFIX))
        return entry and entry.value
    return known.get(name)


def arguments_of(known: Mapping[str, str]) -> AfterValidator:
    """Return a validator of a mapping from names of callbacks or loggers to their arguments."""
    names = [*known, f"{PACKAGE_PREFIX}NAME for the entry point NAME of the group {CALLBACKS_GROUP}"]

    def check(chosen: Mapping[str, Record | None]) -> None:
        lines: list[str] = []
        for name, arguments in chosen.items():
            if (path := class_path(name, known)) is None:
                lines.append(f".{name}: no such name{suggest(name, names)}")
            elif arguments:
                with errors_of(path):
                    allowed = list(inspect.signature(resolve_name(path)).parameters)
                wrong = [argument for argument in arguments if argument not in allowed]
                lines += [f".{name}.{argument}: no such argument{suggest(argument, allowed)}" for argument in wrong]
                # Composer would divide by them.
                numbers = {argument: value for argument, value in arguments.items() if type(value) in (int, float)}
                lines += [f".{name}.{key}: must be > 0, got {value}" for key, value in numbers.items() if value <= 0]
        if lines:
            raise ValueError("\n".join(lines))

    return checked(check)


IS_RANGE = must("be two numbers, the smaller one first", lambda pair: pair[0] <= pair[1])
IS_TEACHER = must(
    f"be {DATA2VEC2}, timm/NAME or ext/NAME",
    lambda name: name == DATA2VEC2 or name.startswith((TIMM_PREFIX, PACKAGE_PREFIX)),
)
IS_PRINTABLE = must("be one or more printable characters", lambda text: bool(text) and text.isprintable())
Text = Annotated[str, IS_PRINTABLE]
PathText = Annotated[Text, AfterValidator(expanduser)]
AddressText = Annotated[PathText, checked(Address.parse)]
# A path that the record of a run keeps, found from any folder; other texts may hide a password, and stay as they are.
FoundAddress = Annotated[AddressText, AfterValidator(lambda place: abspath(place) if exists(place) else place)]
LocalFolder = Annotated[PathText, must("be a path on this machine", lambda folder: "://" not in folder)]
Whole = Annotated[int, Field(ge=0, le=MAX_INT)]
Count = Annotated[int, Field(ge=1, le=MAX_INT)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
# A larger number of batches prepared ahead is taken for a slip.
PrefetchFactor = Annotated[int, Field(ge=1, le=1000)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Range = Annotated[tuple[Positive, Positive], Field(strict=False), IS_RANGE]  # a YAML has lists
Batches = Annotated[Text, duration(r"[1-9]\d{,8}ba", "'5ba' (5 batches)")]
Duration = Annotated[Text, duration(r"[1-9]\d{,8}(ba|ep)", "'5ba' (5 batches) or '5ep' (5 epochs)")]
WarmUp = Annotated[Text, duration(r"\d{1,9}(ba|ep)|0?\.\d+dur|[01](\.0*)?dur", "'5ba', '5ep' or '0.1dur'")]
Arguments = dict[str, dict[str, JsonValue] | None]
IS_MODE = must(
    "be true, false, default or max-autotune-no-cudagraphs",
    lambda choice: isinstance(choice, bool) or choice in ("default", "max-autotune-no-cudagraphs"),
)
Microbatch = Annotated[
    Any, must("be a whole number above 0, 'auto' or null", lambda n: n == "auto" or (type(n) is int and n > 0))
]
