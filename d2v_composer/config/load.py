"""Read a YAML and its overrides into a config. Only this module reads OmegaConf."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from d2v_composer.config.checks import NO_FP16, _folders, _magnitudes, _roots, problems, suggestion
from d2v_composer.config.schema import EvaluateConfig, TrainConfig
from d2v_composer.system.errors import InputError

__all__ = [
    "ConfigT",
    "apply_override",
    "load_config",
    "load_evaluate_config",
    "merge_config",
    "unknown_key",
    "wrong_types",
]

ConfigT = TypeVar("ConfigT")


def load_config(argv: Sequence[str]) -> TrainConfig:
    """Read and check a YAML and its overrides.

    ``${here:FILE}`` in a YAML is FILE beside that YAML.

    Args:
        argv: The YAML's path, then ``dotted.key=value`` any number of times.

    Raises:
        InputError: It names the key and says what is allowed.
    """
    config = merge_config(TrainConfig, argv)
    for problem in problems(config):
        raise InputError(problem)
    return config


def load_evaluate_config(argv: Sequence[str]) -> EvaluateConfig:
    """As :func:`load_config`, for recipes/evaluate.py."""
    config = merge_config(EvaluateConfig, argv)
    if config.precision == "amp_fp16" and not torch.cuda.is_available():
        raise InputError(NO_FP16)
    if config.device_eval_batch_size < 1:
        raise InputError(f"device_eval_batch_size: must be at least 1, got {config.device_eval_batch_size}")
    for problem in (*_magnitudes(config), *_folders({"out": config.out, **_roots("", config)})):
        raise InputError(problem)
    if config.seed < 0:
        raise InputError(f"seed: must be at least 0, got {config.seed}")
    if not config.ks or min(config.ks) < 1:
        raise InputError(f"ks: must be one or more numbers from 1, got {config.ks}")
    if not any(labelled is not None for labelled in config.datasets.values()):
        raise InputError("datasets: there is none; give at least one, as yamls/evaluate.yaml does")
    return config


def merge_config(schema: type[ConfigT], argv: Sequence[str]) -> ConfigT:
    """Schema, YAML and overrides in one: names and types are checked, values are not.

    Raises:
        InputError: A file that is none, an unknown key, a wrong type, or a required key that is missing.
    """
    if not argv:
        raise InputError("no YAML given; usage: COMMAND FILE.yaml [dotted.key=value …]")
    path, *overrides = argv
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key or key.startswith("-"):
            raise InputError(f"{override!r}: an override is dotted.key=value")
    for text in (str(Path(path).resolve()), *overrides):
        if any("\ud800" <= character <= "\udfff" for character in text):  # what Python makes of bytes it cannot decode
            raise InputError(
                f"{text!a}: cannot be read as {sys.getfilesystemencoding()}, the encoding of this locale: set "
                "LC_ALL=C.UTF-8 or PYTHONUTF8=1"
            )
    OmegaConf.register_resolver("here", lambda name: str(Path(path).resolve().parent / name), replace=True)
    structured = OmegaConf.structured(schema)
    try:
        from_file = OmegaConf.load(path)
        if not isinstance(from_file, DictConfig):
            raise InputError(f"{path}: expected keys and values, as in yamls/")
        for layer in (from_file, *(OmegaConf.from_dotlist([override]) for override in overrides)):
            for problem in wrong_types(schema, OmegaConf.to_container(layer)):
                raise InputError(problem)
        merged = OmegaConf.merge(structured, from_file)
        assert isinstance(merged, DictConfig)
        for override in overrides:
            apply_override(merged, override)
        config = OmegaConf.to_object(merged)
    except (ConfigKeyError, ConfigAttributeError) as error:
        raise InputError(unknown_key(error)) from error
    except MissingMandatoryValue as error:
        raise InputError(f"{error.full_key}: is required, and {path} does not give it") from error
    except OmegaConfBaseException as error:
        problem = "must not be null" if "is not Optional" in str(error) else str(error).splitlines()[0]
        raise InputError(f"{error.full_key or path}: {problem}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a YAML of keys and values: {' '.join(str(error).split())}") from error
    assert isinstance(config, schema)
    return config


def apply_override(config: DictConfig, override: str) -> None:
    """Set one ``dotted.key=value``."""
    key, _, text = override.partition("=")
    section = OmegaConf.select(config, key)
    # A section's other fields stay as they are; names of data sets, callbacks and loggers go: datasets={} means none.
    are_names = isinstance(section, DictConfig) and not is_dataclass(OmegaConf.get_type(section))
    alone = OmegaConf.from_dotlist([f"value={text}"])
    written = OmegaConf.to_container(alone)
    assert isinstance(written, dict)
    refers = OmegaConf.is_interpolation(alone, "value")  # to a key of the whole config
    OmegaConf.update(config, key, written["value"] if refers else alone.value, merge=not are_names)


def wrong_types(kind: Any, value: Any, key: str = "") -> Iterator[str]:
    """What OmegaConf would make something else of without a word, or refuse without saying where, a line each."""
    if get_origin(kind) in (Union, UnionType):  # with None, or int | str
        kind = next(member for member in get_args(kind) if member is not NoneType)
    if value is None or (isinstance(value, str) and "${" in value) or kind is Any:
        return
    if is_dataclass(kind) or get_origin(kind) is dict:
        if not isinstance(value, Mapping):
            yield f"{key}: must be a section of keys and values, got {value!r}"
            return
        kinds = get_type_hints(kind) if is_dataclass(kind) else dict.fromkeys(value, get_args(kind)[1])
        for name in kinds.keys() & value.keys():  # an unknown one is OmegaConf's to refuse
            yield from wrong_types(kinds[name], value[name], f"{key}.{name}" if key else str(name))
    elif get_origin(kind) is list:
        if isinstance(value, Mapping) and value and all(str(place).isdigit() for place in value):
            return  # an override of one of its items
        if not isinstance(value, list):
            yield f"{key}: must be a list, got {value!r}"
        elif any(isinstance(each, bool) for each in value):
            yield f"{key}: must be a list without true and false, got {value!r}"
    elif isinstance(value, bool) != (kind is bool):
        yield f"{key}: must {'' if kind is bool else 'not '}be true or false, got {value!r}"
    elif isinstance(value, str) and not (value and value.isprintable()):
        yield f"{key}: must be text of printable characters, got {value!r}"


def unknown_key(error: OmegaConfBaseException) -> str:
    """The line for a key that the schema lacks: what is allowed, and the nearest name."""
    key = error.full_key or ""
    allowed = [known.name for known in fields(error.object_type)] if is_dataclass(error.object_type) else []
    return f"{key}: no such key{suggestion(key.rpartition('.')[2], allowed)}"
