"""Check the sizes in a file, and its tensors against them, before building a model.

The model is laid out on the meta device, without memory, and must have exactly the file's tensors.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from d2v_composer.models.data2vec2 import Data2Vec2, Data2Vec2Config, ImageEncoder, ImageEncoderConfig
from d2v_composer.models.encoder import Encoder
from d2v_composer.models.names import Pooling, Representation
from d2v_composer.models.student import Student, StudentConfig
from d2v_composer.models.timm_teacher import TimmEncoderConfig
from d2v_composer.models.transformer import Transformer
from d2v_composer.system.errors import InputError, reason
from d2v_composer.system.files import check_out_file, out_file

# MERGED FROM d2v_composer/checkpoints/student_file.py: Our own model files: safetensors with sizes and provenance

Kind = Literal["teacher", "student", "classifier"]
# A student of version 2 names its primary embedding in its tensor config_json, which readers of version 1 would refuse.
FORMAT_VERSIONS: dict[Kind, int] = {"teacher": 1, "student": 2, "classifier": 1}
READ_BY: dict[str, str] = {
    "teacher": "a teacher, read by load_teacher",
    "student": "an exported student, read by load_student",
    "classifier": "a fine-tuned classifier, read by timm as d2v2_student",
}
# Characters of sizes or provenance. Ours have some thousands; parsed, they take 25 times as many bytes.
LARGEST_JSON = 4 << 20


class ModelFile(NamedTuple):
    """Contents of a file."""

    config: dict[str, Any]
    provenance: dict[str, Any]
    tensors: dict[str, Tensor]


def write_model_file(path: Path, kind: Kind, content: ModelFile) -> None:
    """Write a complete file, or leave ``path`` as it was.

    Raises:
        InputError: The path cannot be written.
    """
    metadata = {
        "format": f"d2v_composer.{kind}",
        "format_version": str(FORMAT_VERSIONS[kind]),
        "config": json.dumps(content.config),
        "provenance": json.dumps(content.provenance),
    }
    check_out_file(path)
    tensors = {name: tensor.contiguous() for name, tensor in content.tensors.items()}
    with out_file(path) as partial:
        try:
            save_file(tensors, partial, metadata)
        except SafetensorError as error:  # of the disk
            raise OSError(reason(error)) from error


def read_model_file(path: Path, kind: Kind) -> ModelFile:
    """Read a file of one kind.

    Raises:
        InputError: It is corrupt, of another kind, or from a newer version of this package.
    """
    try:
        with _open(path) as file:
            metadata = file.metadata() or {}
            _check_metadata(path, metadata, kind)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        return ModelFile(parse_object(metadata["config"]), parse_object(metadata["provenance"]), tensors)
    except InputError:
        raise
    except (ValueError, KeyError) as error:
        raise InputError(f"{path}: unusable metadata ({reason(error)})") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of any file.

    Raises:
        InputError: It is corrupt.
    """
    with _open(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)


def read_kind(path: Path) -> str:
    """Return the kind of model in a file, such as ``teacher`` or ``student``.

    Raises:
        InputError: It is corrupt.
    """
    with _open(path) as file:
        return (file.metadata() or {}).get("format", "none").removeprefix("d2v_composer.")


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated, or not a safetensors file ({reason(error)})") from error
    except AttributeError as error:  # a number format of a newer torch
        raise InputError(f"{path}: holds numbers of a kind that torch {torch.__version__} lacks ({error})") from error


def _check_metadata(path: Path, metadata: dict[str, str], kind: Kind) -> None:
    found = metadata.get("format", "none")
    if found != f"d2v_composer.{kind}":
        other = READ_BY.get(found.removeprefix("d2v_composer."))
        raise InputError(
            f"{path}: {f'is {other}' if other else f'its format is {_shown(found)}'}; expected d2v_composer.{kind}"
        )
    version, newest = metadata.get("format_version", "none"), FORMAT_VERSIONS[kind]
    if version not in map(str, range(newest + 1)):
        raise InputError(f"{path}: format version {_shown(version)}, this package reads up to {newest}")


def _shown(text: str) -> str:
    return text if text.isprintable() and len(text) < 50 else f"{text[:50]!r}"


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object from any source, within limits of time and memory.

    Raises:
        ValueError: It is too long or too deep, repeats a key, has NaN or Infinity, or is not an object.
    """
    if len(text) > LARGEST_JSON:
        raise ValueError(f"has {len(text)} characters, at most {LARGEST_JSON} are read")
    try:
        content = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nests too deep") from error
    if not isinstance(content, dict):
        raise ValueError(f"must be an object, got {type(content).__name__}")
    return content


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("repeats a key")
    return content


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"has the number {name}, which JSON does not allow")


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins like a safetensors file: the length of a JSON header, then the header."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{"


def sha256(path: Path) -> str:
    """Return the hash of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# MERGED FROM d2v_composer/checkpoints/student_file.py: Compare a file's tensors with those of a model of its size

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# BatchNorm's number of batches, a whole number.
COUNTER = "num_batches_tracked"
# A file of a teacher may hold float16 or bfloat16 numbers.
ROUNDING = 0.01


def shapes_of(build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Return name → shape of a module's tensors, without allocating them."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}


def check_teacher(
    source: Any, config: Data2Vec2Config, tensors: Mapping[str, Tensor], their_name: Callable[[str], str] = str
) -> None:
    """Check a teacher's tensors against its sizes, as :func:`check_tensors`."""
    check_num_blocks(source, config.prenet_depth + config.depth, tensors)
    check_tensors(source, shapes_of(lambda: Data2Vec2(config)), tensors, their_name)


def check_num_blocks(source: Any, num_blocks: int, tensors: Mapping[str, Tensor]) -> None:
    """Check that a file can hold so many blocks; building a thousand takes seconds even without weights.

    Raises:
        InputError: It has fewer tensors.
    """
    if num_blocks > len(tensors):
        raise InputError(f"{source}: unusable sizes: {num_blocks} blocks for {len(tensors)} tensors")


def check_tensors(
    source: Any,
    expected: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Tensor],
    their_name: Callable[[str], str] = str,
) -> None:
    """Check that exactly the expected tensors exist, with their shapes and finite floating-point values.

    Args:
        source: Named in the error.
        expected: Name → shape.
        tensors: Name → tensor of the file.
        their_name: Our name → the file's.

    Raises:
        InputError: Names the first tensor at fault.
    """
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(f"{source}: tensor {their_name(name)} {shape} is missing")
        tensor, label = tensors[name], f"{source}: tensor {their_name(name)}"
        if tuple(tensor.shape) != shape:
            raise InputError(f"{label} has shape {tuple(tensor.shape)}, the sizes ask for {shape}")
        if tensor.layout != torch.strided or tensor.is_meta or not (tensor.dtype in FLOATS or name.endswith(COUNTER)):
            raise InputError(f"{label} is not a dense floating-point tensor")
        if not tensor.isfinite().all():
            raise InputError(f"{label} has values that are not finite")
    unknown = [name for name in tensors if name not in expected]
    if unknown:
        first = f"{their_name(unknown[0])} {tuple(tensors[unknown[0]].shape)}"
        raise InputError(f"{source}: {len(unknown)} unknown tensor(s), first {first}")


def check_same_encoder(source: Any, found: nn.Module, expected: nn.Module) -> None:
    """Check that a teacher has the encoder of a student, up to the rounding of its file.

    Raises:
        InputError: Names the first tensor that differs.
    """
    theirs, ours = found.state_dict(), expected.state_dict()
    for name, tensor in ours.items():
        is_same_shape = name in theirs and theirs[name].shape == tensor.shape
        largest = tensor.abs().max()
        if not is_same_shape or (theirs[name] - tensor).abs().max() > ROUNDING * largest:
            raise InputError(f"{source}: is not the student's teacher: its encoder has another {name}")


# MERGED FROM d2v_composer/checkpoints/student_file.py: The primary embedding of a run: the embedding by which it


class PrimaryEmbedding(NamedTuple):
    """One of a model's embeddings."""

    representation: Representation
    pooling: Pooling

    @property
    def name(self) -> str:
        """The name in metrics, such as layer_mean_cls."""
        return f"{self.representation}_{self.pooling}"


DEFAULT_PRIMARY = PrimaryEmbedding("output", "cls")
"""Of a file without the record of a run, such as a teacher's: data2vec 2.0 base retrieves best with it."""


class ChosenEmbedding(NamedTuple):
    """The embedding that a command computes."""

    primary: PrimaryEmbedding
    origin: str

    def __str__(self) -> str:
        return f"{self.primary.name} ({self.origin})"


def choose_embedding(
    model: Transformer, provenance: Mapping[str, Any], pooling: Pooling | None, representation: Representation | None
) -> ChosenEmbedding:
    """Choose the embedding asked for, or else the primary embedding of the model's run.

    Args:
        model: A student or a teacher.
        provenance: The model's.
        pooling: As asked for; ``None``: the primary embedding's.
        representation: As asked for; ``None``: the primary embedding's.

    Raises:
        InputError: ``pooling`` is cls, and the model has no CLS token.
    """
    if pooling == "cls" and not model.has_cls_token:
        raise InputError("pooling: this model has no CLS token; allowed are mean, mean_patches")
    stored = stored_primary(provenance)
    primary = stored or DEFAULT_PRIMARY
    if primary.pooling == "cls" and not model.has_cls_token:
        primary = primary._replace(pooling="mean_patches")
    asked = {"pooling": pooling, "representation": representation}
    if all(asked.values()):
        origin = "as asked"
    elif stored is None:
        origin = "the default, since the file has no record of a run"
    else:
        origin = "the primary embedding of the model's run"
    given = [option for option, value in asked.items() if value is not None]
    if len(given) == 1:
        origin += f", but {given[0]} as asked"
    return ChosenEmbedding(
        PrimaryEmbedding(representation or primary.representation, pooling or primary.pooling), origin
    )


def stored_primary(provenance: Mapping[str, Any]) -> PrimaryEmbedding | None:
    """Return the primary embedding in the record of a model's run; ``None`` without a record that names one."""
    config = provenance.get("config")
    retrieval = config.get("retrieval") if isinstance(config, Mapping) else None
    for fields in (retrieval, provenance.get("model")):  # of a distillation, of a fine-tuning
        try:
            return parse_primary(fields)
        except ValueError:  # a record of another program
            continue
    return None


def parse_primary(fields: Any) -> PrimaryEmbedding:
    """Read ``representation`` and ``pooling`` from a mapping; others may be there too.

    Raises:
        ValueError: One is missing or unknown.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f"a primary embedding must be an object, got {type(fields).__name__}")
    representation, pooling = fields.get("representation"), fields.get("pooling")
    for value, allowed in ((representation, get_args(Representation)), (pooling, get_args(Pooling))):
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}, got {str(value)[:50]!r}")
    return PrimaryEmbedding(representation, pooling)  # pyright: ignore[reportArgumentType]: checked above


CONFIG_TENSOR = "config_json"
ENCODER = "encoder."
# Of the norm: above the rounding of another machine, below that of bfloat16, in which students train.
OUTPUT_TOLERANCE = 1e-3
ConfigT = TypeVar("ConfigT", Data2Vec2Config, ImageEncoderConfig, StudentConfig, TimmEncoderConfig)
StoredEncoderConfig = ImageEncoderConfig | TimmEncoderConfig


class StoredSizes(NamedTuple):
    """The contents of a tensor of :func:`config_tensor`."""

    sizes: dict[str, Any]
    """Those of ``encoder`` and ``student``, not checked."""
    primary: PrimaryEmbedding
    """The default in a file of version 0.1.0, which has none."""


def build_encoder(config: StoredEncoderConfig) -> Encoder:
    """Build an encoder of any kind, frozen, to load a state dict into."""
    return encoder_class(config)(config).freeze()


def encoder_class(config: StoredEncoderConfig) -> type[Any]:
    """Return the class of an encoder."""
    if isinstance(config, ImageEncoderConfig):
        return ImageEncoder
    from d2v_composer.models.timm_teacher import TimmEncoder  # timm takes seconds to import

    return TimmEncoder


def add_outputs(config: StoredEncoderConfig, tensors: Mapping[str, Tensor]) -> StoredEncoderConfig:
    """Return the config of a timm encoder with what it computes, for its readers; others as they are.

    Args:
        config: The encoder's.
        tensors: Its state dict.
    """
    if not isinstance(config, TimmEncoderConfig) or config.outputs:
        return config
    from timm import __version__ as now

    return dataclasses.replace(config, timm=now, outputs=compute_outputs(config, tensors))


def compute_outputs(config: TimmEncoderConfig, tensors: Mapping[str, Tensor]) -> tuple[float, ...]:
    """Return a few numbers of what an encoder with these tensors computes, wherever they lie and in any dtype."""
    with torch.device("cpu"):
        encoder: Any = build_encoder(config).float()
        encoder.load_state_dict(tensors)
        return encoder.sample_outputs()


def check_outputs(source: Any, config: StoredEncoderConfig, tensors: Mapping[str, Tensor]) -> None:
    """Check that a timm encoder computes what it did at its export, if that was with another version of timm.

    Raises:
        InputError: It computes something else.
    """
    if not isinstance(config, TimmEncoderConfig) or not config.outputs:
        return
    from timm import __version__ as now

    if config.timm == now:
        return
    expected, found = torch.tensor(config.outputs), torch.tensor(compute_outputs(config, tensors))
    if not (found - expected).norm() <= OUTPUT_TOLERANCE * expected.norm():  # NaN is refused too
        raise InputError(
            f"{source}: timm {now} computes something else for {config.model} than timm {config.timm}, with which it "
            f"was exported: pip install timm=={config.timm}"
        )


def sizes_of(student: Student) -> dict[str, Any]:
    """Return a student's sizes and its encoder's."""
    encoder: Any = student.encoder.config
    return {"encoder": asdict(encoder), "student": asdict(student.config)}


def config_tensor(sizes: dict[str, Any], primary: PrimaryEmbedding) -> Tensor:
    """Return a student's sizes and primary embedding as JSON bytes, uint8, for readers of tensors alone."""
    content = sizes | {"primary": primary._asdict()}
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def parse_config_tensor(stored: Tensor) -> StoredSizes:
    """Return the contents of a tensor of :func:`config_tensor`.

    Raises:
        ValueError: The tensor does not hold a JSON object, or its primary embedding is unknown.
    """
    if stored.dtype != torch.uint8 or stored.ndim != 1 or len(stored) > LARGEST_JSON:
        raise ValueError(f"is {stored.dtype} {tuple(stored.shape)}, expected at most {LARGEST_JSON} bytes")
    sizes = parse_object(stored.cpu().numpy().tobytes())
    primary = parse_primary(sizes.pop("primary")) if "primary" in sizes else DEFAULT_PRIMARY
    return StoredSizes(sizes, primary)


def check_student(
    source: Any, sizes: dict[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[StoredEncoderConfig, StudentConfig]:
    """Check an exported student's sizes and tensors. Every reader of such a file calls this first.

    Args:
        source: Named in the error.
        sizes: Those of ``encoder`` and ``student``, from the file.
        tensors: Name → tensor of the file.

    Raises:
        InputError: A size is unusable; a tensor is missing, unknown, misshapen or not finite; or this version of timm
            computes something else.
    """
    _check_names(source, sizes, ("encoder", "student"))
    is_timm = isinstance(sizes["encoder"], dict) and "model" in sizes["encoder"]
    config_class: type[Any] = TimmEncoderConfig if is_timm else ImageEncoderConfig
    encoder_config = read_config(source, config_class, sizes["encoder"])
    student_config = read_config(source, StudentConfig, with_normalization(sizes["student"]))
    check_num_blocks(source, encoder_config.prenet_depth + student_config.depth, tensors)
    kind = encoder_class(encoder_config)  # imports torch._dynamo, which fails on shapes_of's device
    try:
        shapes = shapes_of(lambda: Student(kind(encoder_config), student_config))
    except ValueError as error:
        raise InputError(f"{source}: unusable sizes in its metadata: {error}") from error
    check_tensors(source, shapes, tensors)
    encoder = {name.removeprefix(ENCODER): each for name, each in tensors.items() if name.startswith(ENCODER)}
    check_outputs(source, encoder_config, encoder)
    return encoder_config, student_config


def with_normalization(fields: Any) -> Any:
    """Add to a student's sizes what those of older files leave out, which knew only InstanceNorm."""
    return {"normalization": "instance"} | fields if isinstance(fields, dict) else fields


def read_config(source: Any, config_class: type[ConfigT], fields: Any) -> ConfigT:
    """Build a config from a file's JSON, in which tuples are lists; every field is required.

    Raises:
        InputError: A field is missing, unknown or out of range.
    """
    _check_names(source, fields, (field.name for field in dataclasses.fields(config_class)))
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{source}: unusable sizes in its metadata: {reason(error)[:200]}") from error


def _check_names(source: Any, fields: Any, names: Iterable[str]) -> None:
    unusable = f"{source}: unusable sizes in its metadata"
    if not isinstance(fields, dict):
        raise InputError(f"{unusable}: must be an object, got {type(fields).__name__}")
    expected = set(names)
    missing, unknown = expected - fields.keys(), fields.keys() - expected
    if missing or unknown:
        fault = f"{min(missing)} is missing" if missing else f"unknown key {min(unknown)[:50]!r}"
        raise InputError(f"{unusable}: {fault}")
