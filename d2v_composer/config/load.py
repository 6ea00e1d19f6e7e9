"""Read a YAML and its overrides into a config. Only this module reads OmegaConf."""

import inspect
import math
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from os.path import isfile
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from d2v_composer.checkpoints.resume import LATEST
from d2v_composer.config.schema import (
    EvaluateConfig,
    FinetuneConfig,
    LabeledSetConfig,
    LoaderConfig,
    ModelConfig,
    RunConfig,
    ShardLoaderConfig,
    TeacherConfig,
    TrainConfig,
    TrainerConfig,
    TrainLoaderConfig,
    find_wrong_values,
    suggest,
)
from d2v_composer.data.index import find_missing_index
from d2v_composer.data.labeled import find_missing_files
from d2v_composer.models.execution import choose_precision, find_missing, name_precision
from d2v_composer.models.names import DATA2VEC2, PREFIX
from d2v_composer.system.addresses import Address, RunFolder
from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import find_missing_file
from d2v_composer.system.files import find_unwritable
from d2v_composer.system.machine import find_wrong_packages
from d2v_composer.system.ranks import is_one_node, let_first_rank_report, num_ranks

# MERGED FROM d2v_composer/config/load.py: Checks of a config that concern several fields at once, or names behind

# Composer divides by these arguments without a check.
DIVISORS = ("batch_log_interval", "flush_interval", "log_duplicated_metric_every_n_steps", "window_size")


def find_contradictions(config: RunConfig) -> Iterator[str]:
    """Yield a line for each value that does not go with another one; each alone is within its limits."""
    if isinstance(config, ModelConfig):
        yield from _model(config)
    if isinstance(config, EvaluateConfig):
        yield from _evaluation(config)
    if isinstance(config, TrainerConfig):
        yield from _warmup(config)
        yield from _log_address(config)
    if isinstance(config, TrainConfig):
        yield from _teacher(config.teacher)
        yield from _batches(config.global_train_batch_size, config.train_loader)
        yield from _precision(config)
    if isinstance(config, FinetuneConfig):
        yield from _finetuning(config)


def find_wrong_arguments(config: RunConfig) -> Iterator[str]:
    """Yield a line for each callback or logger that does not exist, and for each of their arguments that is wrong."""
    if isinstance(config, TrainerConfig):
        from d2v_composer.callbacks.yaml_names import CALLBACKS, LOGGERS  # Composer's, which takes seconds to import

        yield from _arguments("callbacks", CALLBACKS, config.callbacks)
        yield from _arguments("loggers", LOGGERS, config.loggers)


def _teacher(teacher: TeacherConfig) -> Iterator[str]:
    if teacher.model == DATA2VEC2:
        if teacher.checkpoint is None:
            yield "teacher.checkpoint: must not be null for data2vec2; only timm has pretrained weights to fetch"
        if teacher.image_size is not None:
            yield f"teacher.image_size: must be null for data2vec2, whose file fixes it, got {teacher.image_size}"
    elif teacher.weights != "model":
        yield f"teacher.weights: must be model for {teacher.model}, got {teacher.weights}"


def _model(config: ModelConfig) -> Iterator[str]:
    if not config.model.startswith(PREFIX):
        for name in ("checkpoint", "first_blocks", "image_size"):
            if (value := getattr(config, name)) is not None:
                yield f"{name}: must be null unless the model is timm/NAME, got {value}"


def _evaluation(config: EvaluateConfig) -> Iterator[str]:
    if not any(config.datasets.values()):
        yield (
            "datasets: must have at least one data set that is not null, such as "
            "'datasets={cifar10: {format: cifar10, root: datasets, download: true}}'"
        )


def _finetuning(config: FinetuneConfig) -> Iterator[str]:
    if config.dataset is None:
        yield "dataset: is required, such as 'dataset={format: cifar10, root: datasets, download: true}'"
    if config.from_scratch and not config.train_encoder:
        yield "from_scratch: needs train_encoder=true: a frozen encoder would keep its random weights"
    loader = config.train_loader
    if loader.stream:
        if config.dataset is not None and config.dataset.format != "mds":
            yield f"train_loader.stream: must be false unless dataset.format is mds, got {config.dataset.format}"
        yield from _batches(config.global_train_batch_size, loader)
    else:
        of_any_loader, default = {each.name for each in fields(LoaderConfig)}, ShardLoaderConfig()
        for name in (each.name for each in fields(ShardLoaderConfig)):
            if name not in of_any_loader and getattr(loader, name) != getattr(default, name):
                yield f"train_loader.{name}: needs train_loader.stream=true"
    if config.callbacks.get("health") is not None:
        yield "callbacks.health: must be null in a fine-tuning: it compares predictions with a teacher's targets"
    if config.algorithms.mixup is not None and config.algorithms.cutmix is not None:
        yield "algorithms.cutmix: Composer cannot mix labels twice: mixup or cutmix must be null"


def _batches(batch_size: int, loader: ShardLoaderConfig) -> Iterator[str]:
    parts = loader.num_canonical_nodes
    if batch_size % parts:
        yield f"train_loader.num_canonical_nodes: must divide global_train_batch_size {batch_size}, got {parts}"


def _warmup(config: TrainerConfig) -> Iterator[str]:
    from composer.core import Time  # takes seconds

    warmup, duration = map(Time.from_timestring, (config.scheduler.t_warmup, config.max_duration))
    if warmup.unit == duration.unit and warmup > duration:
        yield describe_long_warmup(config)


def describe_long_warmup(config: TrainerConfig, why: str = "") -> str:
    """Return the line for a warm-up that is longer than the run.

    Args:
        config: The run's.
        why: Follows the value.
    """
    return (
        f"scheduler.t_warmup: must not be longer than max_duration {config.max_duration}, "
        f"got {config.scheduler.t_warmup}{why}; scheduler.t_warmup=0.1dur is a tenth of any run"
    )


def _precision(config: TrainConfig) -> Iterator[str]:
    with_fsdp = config.parallelism_config.fsdp is not None
    computed = str(choose_precision(config.precision).dtype).removeprefix("torch.")
    allowed = ["float32"] if with_fsdp or computed == "float32" else ["float32", computed]
    if config.frozen_dtype not in (None, *allowed):
        why = "FSDP, which casts what it gathers" if with_fsdp else f"precision {config.precision}"
        yield f"frozen_dtype: must be {' or '.join(allowed)} with {why}, got {config.frozen_dtype}"
    if with_fsdp and config.device_train_microbatch_size == "auto":
        yield "device_train_microbatch_size: Composer has no 'auto' with FSDP; give a number or null"


def _arguments(section: str, known: Mapping[str, type], chosen: Mapping[str, Any]) -> Iterator[str]:
    """Compare the chosen callbacks or loggers, and their arguments, with those that exist."""
    for name, arguments in chosen.items():
        if name not in known:
            yield f"{section}.{name}: no such name{suggest(name, list(known))}"
        elif arguments is not None and not isinstance(arguments, dict):
            yield f"{section}.{name}: must be arguments by name, {{}} for none or null for off, got {arguments!r}"
        elif arguments is not None:
            parameters = inspect.signature(known[name]).parameters.values()
            allowed = [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
            for argument, value in arguments.items():
                key = f"{section}.{name}.{argument}"
                if argument not in allowed:
                    yield f"{key}: no such argument{suggest(argument, allowed)}"
                elif argument in DIVISORS and (not isinstance(value, int) or value < 1):
                    yield f"{key}: must be a number of at least 1, got {value!r}"
                elif not _is_finite(value):
                    yield f"{key}: must be finite, got {value}"


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _log_address(config: TrainerConfig) -> Iterator[str]:
    """Check that the log is uploaded to the bucket of the checkpoints: the run has no other uploader."""
    arguments = config.loggers.get("jsonl")
    remote = arguments.get("remote") if isinstance(arguments, dict) else None
    if remote is None:
        return
    saved = Address.parse(config.save_folder or "")
    try:
        log = Address.parse(str(remote))
    except ValueError as error:
        yield f"loggers.jsonl.remote: {error}"
        return
    if not saved.is_remote or not log.path or (log.scheme, log.bucket) != (saved.scheme, saved.bucket):
        where = "a file in save_folder's bucket" if saved.is_remote else "null"
        yield f"loggers.jsonl.remote: must be {where} with save_folder {config.save_folder}, got {remote!r}"


# MERGED FROM d2v_composer/config/load.py: Compare the installed packages of loggers with the extras of this package.


def needs_of_loggers(loggers: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each chosen logger whose package is missing, or has a version that Composer cannot use.

    Args:
        loggers: Name → arguments; ``None``: off.
    """
    from d2v_composer.callbacks.yaml_names import LOGGERS  # Composer's, which takes seconds to import

    for name, arguments in loggers.items():
        if arguments is not None and name in LOGGERS:
            yield from (f"loggers.{name}: {line}" for line in find_wrong_packages(extra=name))


# MERGED FROM d2v_composer/config/load.py: Checks of what a config needs of this machine: GPU, compiler, ranks,


def find_unmet_needs(config: RunConfig) -> Iterator[str]:
    """Yield a line for each field that this machine cannot fulfil. Values may be outside their limits."""
    if not torch.cuda.is_available():
        yield from needs_of_a_gpu(config)
    if isinstance(config, TrainerConfig):
        yield from needs_of_training(config)
        # Of several nodes, one may lack a file: the builders tell all, once they have joined. Here, others would wait.
        if is_one_node():
            yield from needs_of_files(config)
        yield from needs_of_loggers(config.loggers)
    elif isinstance(config, EvaluateConfig):
        yield from needs_of_an_evaluation(config)


def needs_of_a_gpu(config: RunConfig) -> Iterator[str]:
    """Yield a line for each field that needs a GPU."""
    if config.precision == "amp_fp16":
        yield "precision: amp_fp16 needs a GPU, and this machine has none; on a CPU: precision=fp32 or amp_bf16 or auto"
    if isinstance(config, TrainerConfig) and config.device_train_microbatch_size == "auto":
        yield "device_train_microbatch_size: 'auto' needs a GPU, and this machine has none; give a number or null"
    if isinstance(config, TrainConfig) and config.parallelism_config.fsdp is not None:
        yield "parallelism_config.fsdp: needs GPUs: between CPUs torch adds gradients instead of averaging them"


def needs_of_training(config: TrainerConfig) -> Iterator[str]:
    """Yield a line for each field whose compiler or ranks are missing."""
    if isinstance(config, TrainConfig) and config.compile and (missing := find_missing()) is not None:
        yield f"compile: {missing}; install it, or compile=false"
    if config.global_train_batch_size % (ranks := num_ranks()):
        yield f"global_train_batch_size: must divide by the {ranks} ranks, got {config.global_train_batch_size}"


def needs_of_files(config: TrainerConfig) -> Iterator[str]:
    """Yield a line for each field whose files are missing or cannot be written."""
    if isinstance(config, TrainConfig):
        checkpoint = config.teacher.checkpoint
        if checkpoint is not None and (missing := find_missing_file(checkpoint)) is not None:
            yield f"teacher.checkpoint: {config.teacher.checkpoint}: {missing}"
        yield from needs_of_training_images(config.train_loader)
        yield from needs_of_labeled_sets("retrieval.datasets.", config.retrieval.datasets)
    if isinstance(config, FinetuneConfig):
        yield from needs_of_model(config)
        if config.train_loader.remote is not None and config.dataset is not None and config.dataset.format == "mds":
            yield from needs_of_remote_set(Path(config.dataset.root))
        else:
            yield from needs_of_labeled_sets("", {"dataset": config.dataset})
    with suppress(ValueError):  # a malformed save_folder, which find_wrong_values names
        local = config.save_folder and RunFolder.parse(config.save_folder).local
        if local and (fault := find_unwritable(local)) is not None:
            yield f"save_folder: {local}: {fault}"
    if config.load_path is not None and (missing := find_missing_file(config.load_path)) is not None:
        yield f"load_path: {config.load_path}: {missing}"


def needs_of_training_images(loader: TrainLoaderConfig) -> Iterator[str]:
    """Yield a line if the data set is not there, or the cache of a remote one cannot be written."""
    if loader.remote is not None:
        if (fault := find_unwritable(Path(loader.local))) is not None:
            yield f"train_loader.local: {loader.local}: {fault}"
    elif (missing := find_missing_index(Path(loader.local))) is not None:
        yield f"train_loader.local: {loader.local}: {missing}; or set train_loader.remote to an address"


def needs_of_remote_set(root: Path) -> Iterator[str]:
    """Yield a line if the cache of remote train images cannot be written, or the test images are not there."""
    if (fault := find_unwritable(root / "train")) is not None:
        yield f"dataset.root: {root / 'train'}: {fault}"
    if (missing := find_missing_index(root / "test")) is not None:
        yield f"dataset.root: {root / 'test'}: {missing}"


def needs_of_labeled_sets(prefix: str, chosen: Mapping[str, LabeledSetConfig | None]) -> Iterator[str]:
    """Yield a line for each labeled set that is not there, and will not be downloaded."""
    for name, labeled in chosen.items():
        if labeled is not None:
            missing = find_missing_files(labeled.format, Path(labeled.root), labeled.download)
            if missing is not None:
                yield f"{prefix}{name}.root: {missing}"


def find_missing_model(name: str) -> str | None:
    """Return why a model is not there, or ``None``; timm's pretrained ones are on the hub."""
    return None if name.startswith(PREFIX) else find_missing_file(name)


def needs_of_model(config: ModelConfig) -> Iterator[str]:
    """Yield a line for each file of a model and its teacher that is missing."""
    # A run that saves a checkpoint removes its pointer for a moment.
    is_latest = Path(config.model).name == LATEST
    if not is_latest and (missing := find_missing_model(config.model)) is not None:
        yield f"model: {config.model}: {missing}"
    if config.teacher is not None and (missing := find_missing_model(config.teacher)) is not None:
        yield f"teacher: {config.teacher}: {missing}"
    if config.checkpoint is not None and (missing := find_missing_file(config.checkpoint)) is not None:
        yield f"checkpoint: {config.checkpoint}: {missing}"


def needs_of_an_evaluation(config: EvaluateConfig) -> Iterator[str]:
    """Yield a line for each field whose files are missing or cannot be written."""
    yield from needs_of_model(config)
    yield from needs_of_labeled_sets("datasets.", config.datasets)
    if config.out is not None and (fault := find_unwritable(Path(config.out))) is not None:
        yield f"out: {config.out}: {fault}"


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
        merged: Changed in place: a text is empty, and a labeled set without format or root is off.
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
