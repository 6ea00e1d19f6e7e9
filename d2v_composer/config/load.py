"""Read a YAML and its overrides into a config."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from os import devnull
from os.path import isfile
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from d2v_composer.config.schema import NEEDS_DATA, EvaluateConfig, RunConfig, TrainConfig
from d2v_composer.config.types import describe_problem, suggest
from d2v_composer.models.provenance import Json, Record
from d2v_composer.system.errors import InputError, reading
from d2v_composer.system.processes import let_first_rank_report

ConfigT = TypeVar("ConfigT", bound=RunConfig)


def load_config(argv: Sequence[str], values: Mapping[str, Json] = {}, *, needs_data: bool = False) -> TrainConfig:
    """Read and check a YAML and its overrides.

    ``${here:FILE}`` in a YAML stands for the path of FILE beside that YAML.

    Args:
        argv: The YAML's path, then any number of ``dotted.key=value``.
        values: Dotted key → value, which replaces the YAML's value of this key.
        needs_data: Also check that ``train_loader`` names training samples.

    Raises:
        InputError: The YAML cannot be read, or keys or values are wrong; the error has a line for each problem.

    Example:
        >>> config = load_config(["quickstart.yaml", "student.depth=2"])
        >>> config.student.depth
        2
    """
    return load_checked(TrainConfig, argv, values, NEEDS_DATA if needs_data else None)


def load_evaluate_config(argv: Sequence[str]) -> EvaluateConfig:
    """Read and check the optional YAML and the overrides of an evaluation; see :func:`load_config`."""
    has_yaml = not argv or "=" not in argv[0] or isfile(argv[0])  # Path.is_file raises for a long text
    return load_checked(EvaluateConfig, argv if has_yaml else [devnull, *argv])


def load_checked(
    schema: type[ConfigT], argv: Sequence[str], values: Mapping[str, Json] = {}, context: str | None = None
) -> ConfigT:
    problems: list[str] = []
    try:
        config = schema.model_validate(merge_settings(schema, argv, values, problems), context=context)
        if not problems:
            return config
    except ValidationError as error:
        problems += [line for detail in error.errors(include_url=False) for line in explain(schema, detail)]
    except InputError as error:
        problems += error.args
    let_first_rank_report()
    raise InputError(*dict.fromkeys(problems))


def read_yaml(path: str | Path) -> Json:
    """Read a YAML mapping, without resolving its references.

    Raises:
        InputError: The file cannot be read, is not a YAML mapping, or has a key twice.
    """
    with reading(path):
        try:
            settings = OmegaConf.load(path)
        except yaml.YAMLError as error:
            raise InputError(f"{path}: cannot be parsed as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, DictConfig):
        raise InputError(f"{path}: expected a YAML mapping of keys to values")
    return OmegaConf.to_container(settings)


def merge_settings(
    schema: type[BaseModel], argv: Sequence[str], preset: Mapping[str, Json], problems: list[str]
) -> Json:
    """Merge defaults, YAML, ``preset`` and overrides, in this order, and resolve references.

    For each override that cannot be read, append a line to ``problems``.
    """
    if not argv:
        raise InputError("no YAML given: expected FILE.yaml [dotted.key=value …]; --help shows examples")
    if options := [word for word in argv if word.startswith("--")]:
        raise InputError(*(f"{word}: no such option; a setting is key=value, such as seed=3" for word in options))
    path, *overrides = argv
    OmegaConf.register_resolver("here", lambda name: str(Path(path).resolve().parent / name), replace=True)
    values = read_yaml(path)
    config = values.get("config")  # run.yaml, a run's record, has the settings below config
    values = config if isinstance(config, dict) else values
    merged = OmegaConf.create(deep_merge(defaults(schema), values))
    for key, value in preset.items():
        assign(merged, key, value)
    for override in overrides:
        try:
            assign(merged, *parse_override(schema, override))
        except (OmegaConfBaseException, yaml.YAMLError, LookupError, TypeError, ValueError) as error:
            problems.append(
                f"{override!r}: expected dotted.key=value, where value is valid YAML: {' '.join(str(error).split())}"
            )
    try:
        return OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(*problems, f"{error.full_key or path}: {str(error).splitlines()[0]}") from error


def deep_merge(below: Record, above: Record) -> Record:
    """Merge two nested dicts, recursively; where both have a value, take the value of ``above``."""
    both = {key: value for key, value in above.items() if isinstance(value, dict) and isinstance(below.get(key), dict)}
    return {**below, **above, **{key: deep_merge(below[key], value) for key, value in both.items()}}


def defaults(schema: type[BaseModel]) -> Record:
    """Return the default values of fields, as nested dicts of plain values."""
    required = {
        name: find_section(field.annotation) for name, field in schema.model_fields.items() if field.is_required()
    }
    sections = {name: defaults(section) for name, section in required.items() if section is not None}
    return schema.model_construct().model_dump(mode="json") | sections


def parse_override(schema: type[BaseModel], override: str) -> tuple[str, Json]:
    """Return the key and the value of an override, ``dotted.key=value``.

    The value of a text field is read as YAML only if it is null or quoted.
    """
    key, equals, text = override.partition("=")
    if not equals or not key or key.startswith("-"):
        raise ValueError(f"got {key!r}")
    *place, name = key.split(".")
    field = section_at(schema, place).model_fields.get(name)
    if field is not None and is_text(field.annotation) and text != "null" and not text.startswith(("'", '"')):
        return key, text
    value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    assert isinstance(value, dict)
    return key, value["value"]


def assign(merged: DictConfig, key: str, value: Json) -> None:
    """Set the value of a dotted key."""
    # A section keeps its other fields. A mapping of data sets, callbacks or loggers is replaced, empty or not.
    is_mapping = key.startswith(("callbacks", "loggers")) or key.endswith("datasets")
    OmegaConf.update(merged, key, value, merge=isinstance(value, dict) and not is_mapping)


def explain(schema: type[RunConfig], error: ErrorDetails) -> list[str]:
    """Return a pydantic error as lines of text, each with the dotted key and a problem."""
    place = error["loc"]
    key = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in place)
    if error["type"] == "extra_forbidden":
        allowed = [*section_at(schema, place[:-1]).model_fields]
        problems = [f"no such key{suggest(str(place[-1]), allowed)}"]
    else:  # '.below: problem' continues the key
        problems = describe_problem(error).splitlines()
    return [(key + text if text.startswith(".") else f"{key}: {text}").lstrip(".") for text in problems]


def is_text(kind: object) -> bool:
    """Return whether a type allows only text, or only text and ``None``."""
    if get_origin(kind) is Annotated:
        return is_text(get_args(kind)[0])
    return kind in (str, NoneType) or (bool(get_args(kind)) and all(map(is_text, get_args(kind))))


def section_at(schema: type[BaseModel], place: Sequence[str | int]) -> type[BaseModel]:
    """Return the class of the section at a path of keys, or of the last section on the path."""
    for name in place:
        if name in schema.model_fields:  # other names are those of data sets
            schema = find_section(schema.model_fields[str(name)].annotation) or schema
    return schema


def find_section(kind: Any) -> type[BaseModel] | None:
    """Return the first section class in a type such as ``S | None``; ``None`` if the type has no section class."""
    with suppress(TypeError):
        if issubclass(kind, BaseModel):
            return kind
    return next(filter(None, map(find_section, get_args(kind))), None)
