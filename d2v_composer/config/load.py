"""Read a YAML and its overrides into a config. Only this module reads OmegaConf."""

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from os.path import isfile
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from d2v_composer.config.environment import find_unmet_needs
from d2v_composer.config.evaluate import EvaluateConfig
from d2v_composer.config.finetune import FinetuneConfig
from d2v_composer.config.limits import find_wrong_values, suggest
from d2v_composer.config.schema import RunConfig, TrainConfig
from d2v_composer.config.values import find_contradictions, find_wrong_arguments
from d2v_composer.models.precision import name_precision
from d2v_composer.system.errors import InputError
from d2v_composer.system.launched_rank import let_first_rank_report

__all__ = ["load_config", "load_evaluate_config", "load_finetune_config"]

ConfigT = TypeVar("ConfigT", bound=RunConfig)

# Stands for its path in errors.
NO_YAML = "the command line"


def load_config(argv: Sequence[str]) -> TrainConfig:
    """Read and check a YAML and its overrides.

    ``${here:FILE}`` in a YAML is FILE beside that YAML.

    Args:
        argv: The YAML's path, then any number of ``dotted.key=value``.

    Raises:
        InputError: It names each wrong key and what is allowed, in a line for each.
    """
    return load_checked(TrainConfig, argv)


def load_finetune_config(argv: Sequence[str]) -> FinetuneConfig:
    """Read and check the arguments of a fine-tuning, as :func:`load_config` does."""
    return load_checked(FinetuneConfig, argv)


def load_evaluate_config(argv: Sequence[str]) -> EvaluateConfig:
    """Read and check the arguments of an evaluation, as :func:`load_config` does; the YAML may be left out."""
    if argv and "=" in argv[0] and not isfile(argv[0]):  # Path.is_file raises for a long text
        argv = [NO_YAML, *argv]
    return load_checked(EvaluateConfig, argv)


def load_checked(schema: type[ConfigT], argv: Sequence[str]) -> ConfigT:
    problems: list[str] = []
    with collected(problems):
        path, *overrides = check_arguments(argv)
        merged = merge_config(schema, path, overrides, problems)
        with errors_in_one_line(path):
            problems += fill_missing(merged, path, {field_of(problem) for problem in problems})
            config: Any = OmegaConf.to_object(merged)
            config.precision = name_precision(config.precision)  # so that log and checkpoint tell it
        problems += find_problems(config, {field_of(problem) for problem in problems})
        if not problems:
            return config
    let_first_rank_report()
    raise InputError(*dict.fromkeys(problems))


def merge_config(schema: type, path: str, overrides: Sequence[str], problems: list[str]) -> DictConfig:
    """Merge schema, YAML and overrides; leave out each value with a wrong name or type, and add it to ``problems``."""
    OmegaConf.register_resolver("here", lambda name: str(Path(path).resolve().parent / name), replace=True)
    with errors_in_one_line(path):
        from_file = OmegaConf.create() if path == NO_YAML else OmegaConf.load(path)
    if not isinstance(from_file, DictConfig):
        raise InputError(f"{path}: expected keys and values, as in yamls/")
    merged: DictConfig = OmegaConf.structured(schema)
    for layer in split(OmegaConf.to_container(from_file)):
        with collected(problems), errors_in_one_line(path):
            raise_all(find_wrong_keys(schema, layer))
            merged.merge_with(layer)
    for override in overrides:
        with collected(problems), errors_in_one_line(path):
            raise_all(find_wrong_keys(schema, OmegaConf.to_container(OmegaConf.from_dotlist([override]))))
            apply_override(merged, override)
    return merged


def split(section: Any) -> Iterator[dict[Any, Any]]:
    """Yield each value of nested sections alone, in its sections."""
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from ({name: inner} for inner in split(value))
        else:
            yield {name: value}


def fill_missing(merged: DictConfig, path: str, wrong_fields: Collection[str]) -> list[str]:
    """Give each required value that is missing a stand-in, so that the other values can be checked.

    Args:
        merged: Changed in place: a text is empty, and a labelled set without format or root is off.
        path: The YAML's.
        wrong_fields: Those whose value was left out because it is wrong.

    Returns:
        A line for each missing value, except those of ``wrong_fields``.
    """
    missing = sorted(OmegaConf.missing_keys(merged))
    for key in missing:
        section = key.rpartition(".")[0]
        in_a_set = section == "dataset" or section.rpartition(".")[0].endswith("datasets")
        OmegaConf.update(merged, section if in_a_set else key, None if in_a_set else "")
    return [f"{key}: is required, and {path} does not give it" for key in missing if key not in wrong_fields]


def find_problems(config: RunConfig, wrong_fields: Collection[str]) -> Iterator[str]:
    """Yield a line for each wrong value, contradiction and need, except those of fields that are known to be wrong."""
    wrong = [line for line in find_wrong_values(config) if field_of(line) not in wrong_fields]
    yield from wrong
    yield from find_wrong_arguments(config)
    wrong_fields = {*wrong_fields, *map(field_of, wrong)}
    if not wrong_fields:  # right values only can contradict each other
        for line in find_contradictions(config):
            if not any(field.startswith(f"{field_of(line)}.") for field in wrong_fields):
                yield line
    yield from (line for line in find_unmet_needs(config) if field_of(line) not in wrong_fields)


def field_of(problem: str) -> str:
    """Return the field that the line of a problem names."""
    return problem.partition(":")[0]


@contextmanager
def collected(problems: list[str]) -> Iterator[None]:
    """Add the problems that a block raises to a list."""
    try:
        yield
    except InputError as error:
        problems += error.args


def raise_all(problems: Iterable[str]) -> None:
    """Raise one error for all problems, if there are any."""
    if problems := list(problems):
        raise InputError(*problems)


def check_arguments(argv: Sequence[str]) -> Sequence[str]:
    """Refuse arguments that are not a YAML's path and overrides."""
    if not argv:
        raise InputError("no YAML given: expected FILE.yaml [dotted.key=value …]; --help shows examples")
    for override in argv[1:]:
        key, equals, _ = override.partition("=")
        if not equals or not key or key.startswith("-"):
            raise InputError(f"{override!r}: an override is dotted.key=value")
    for text in (str(Path(argv[0]).resolve()), *argv[1:]):
        if any("\ud800" <= character <= "\udfff" for character in text):  # Python's stand-ins for undecodable bytes
            raise InputError(
                f"{text!a}: cannot be read as {sys.getfilesystemencoding()}, the encoding of this locale: set "
                "LC_ALL=C.UTF-8 or PYTHONUTF8=1"
            )
    return argv


@contextmanager
def errors_in_one_line(path: str) -> Iterator[None]:
    """Turn the errors of OmegaConf, YAML and the file system into InputErrors."""
    try:
        yield
    except InputError:
        raise
    except OmegaConfBaseException as error:
        problem = "must not be null" if "is not Optional" in str(error) else str(error).splitlines()[0]
        raise InputError(f"{error.full_key or path}: {problem}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a YAML of keys and values: {' '.join(str(error).split())}") from error


def apply_override(config: Any, override: str) -> None:
    """Set one ``dotted.key=value``."""
    key, _, text = override.partition("=")
    section = OmegaConf.select(config, key)
    # A section keeps its other fields. A mapping of data sets, callbacks or loggers is replaced, empty or not.
    is_mapping = isinstance(section, DictConfig) and not is_dataclass(OmegaConf.get_type(section))
    alone = OmegaConf.from_dotlist([f"value={text}"])
    is_reference = OmegaConf.is_interpolation(alone, "value")  # to a key of the whole config
    written: Any = OmegaConf.to_container(alone)
    OmegaConf.update(config, key, written["value"] if is_reference else alone.value, merge=not is_mapping)


def find_wrong_keys(kind: Any, value: Any, key: str = "") -> Iterator[str]:
    """Yield a line for each unknown key, and for each value that OmegaConf would silently convert."""
    if get_origin(kind) in (Union, UnionType):  # with None, or int | str
        kind = next(member for member in get_args(kind) if member is not NoneType)
    if value is None or (isinstance(value, str) and "${" in value) or kind is Any:
        return
    if is_dataclass(kind) or get_origin(kind) is dict:
        yield from _find_wrong_section(kind, value, key)
    elif get_origin(kind) is list:
        if isinstance(value, Mapping) and value and all(str(place).isdigit() for place in value):
            return  # an override of one item
        if not isinstance(value, list):
            yield f"{key}: must be a list, got {value!r}"
        elif any(isinstance(each, bool) for each in value):
            yield f"{key}: must be a list without true and false, got {value!r}"
    elif isinstance(value, bool) != (kind is bool):
        yield f"{key}: must {'' if kind is bool else 'not '}be true or false, got {value!r}"
    elif isinstance(value, str) and not (value and value.isprintable()):
        yield f"{key}: must be text of printable characters, got {value!r}"


def _find_wrong_section(kind: Any, section: Any, key: str) -> Iterator[str]:
    if not isinstance(section, Mapping):
        yield f"{key}: must be a section of keys and values, got {section!r}"
        return
    kinds = get_type_hints(kind) if is_dataclass(kind) else dict.fromkeys(section, get_args(kind)[1])
    for name, value in section.items():
        inner = f"{key}.{name}" if key else str(name)
        if name in kinds:
            yield from find_wrong_keys(kinds[name], value, inner)
        else:
            yield f"{inner}: no such key{suggest(str(name), list(kinds))}"
