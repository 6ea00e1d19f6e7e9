"""Teachers and students from files and back."""

import datetime
import json
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from d2v_composer.addresses import file_name
from d2v_composer.errors import InputError
from d2v_composer.fetch import fetch, is_remote
from d2v_composer.models.artifact import Artifact, is_safetensors, read_artifact, read_kind, sha256, write_artifact
from d2v_composer.models.checkpoint import Weights, check_tensors, expected_shapes, read_fairseq_checkpoint
from d2v_composer.models.data2vec2 import Data2Vec2, Data2Vec2Config
from d2v_composer.models.image_encoder import ImageEncoder, ImageEncoderConfig
from d2v_composer.models.safe_pickle import load_untrusted
from d2v_composer.models.student import Student, StudentConfig
from d2v_composer.persistence import reason

__all__ = [
    "CONFIG_TENSOR",
    "Conversion",
    "config_tensor",
    "configs_from_tensor",
    "convert_teacher",
    "load_any",
    "load_student",
    "load_teacher",
    "save_student",
]

# Composer removes a pointer before it makes the next one.
POINTER_ATTEMPTS, POINTER_PAUSE = 20, 0.05

CONFIG_TENSOR = "config_json"
LICENCE_NOTE = "as the source's; the data2vec 2.0 checkpoints released by Meta are CC BY-NC 4.0"


def load_teacher(path: str | Path, weights: Weights = "model") -> Data2Vec2:
    """A frozen teacher, in eval mode and float32.

    Args:
        path: fairseq's .pt or a file of ``convert_teacher``: a local path, https://, or an object store's address
            (fetched once and cached).
        weights: ``model``, or ``ema`` for the averaged ones. A converted file holds one of the two.

    Raises:
        InputError: There is no such file, or it cannot serve as a teacher; the message says why.
    """
    file = fetch(path)
    if not is_safetensors(file):
        checkpoint = read_fairseq_checkpoint(file, weights)
        provenance = {
            "source": file_name(path),
            "sha256": sha256(file),
            "weights": weights,
            "licence": LICENCE_NOTE,
        }
        return _build_teacher(checkpoint.config, checkpoint.tensors, provenance)
    artifact = read_artifact(file, "teacher")
    stored_weights = artifact.provenance.get("weights")
    if stored_weights != weights:
        raise InputError(f"{path}: was converted with --weights {stored_weights}, and holds no {weights} weights")
    config = _read_config(path, Data2Vec2Config, artifact.config)
    check_tensors(path, expected_shapes(config), artifact.tensors)
    return _build_teacher(config, artifact.tensors, artifact.provenance)


def _build_teacher(config: Data2Vec2Config, tensors: dict[str, torch.Tensor], provenance: dict[str, Any]) -> Data2Vec2:
    teacher = Data2Vec2(config, provenance)
    teacher.load_state_dict(tensors)
    return teacher


class Conversion(NamedTuple):
    """What ``convert_teacher`` did."""

    config: Data2Vec2Config
    provenance: dict[str, Any]
    used: list[str]
    left: list[str]


def convert_teacher(
    source: str | Path,
    out: Path,
    weights: Weights = "model",
    dtype: torch.dtype = torch.float32,
    licence: str | None = None,
) -> Conversion:
    """fairseq's checkpoint as one safetensors file.

    Args:
        source: As :func:`load_teacher`'s path.
        out: The file to write.
        weights: Which weights to keep.
        dtype: How to store them; a loaded teacher is float32 all the same.
        licence: A note on the weights' licence for the metadata.

    Raises:
        InputError: As :func:`load_teacher`.
    """
    file = fetch(source)
    if is_safetensors(file):
        raise InputError(f"{source}: is a safetensors file already, expected a fairseq checkpoint")
    checkpoint = read_fairseq_checkpoint(file, weights)
    provenance = {
        "source": file_name(source),
        "sha256": sha256(file),
        "weights": weights,
        "dtype": str(dtype).removeprefix("torch."),
        "licence": licence or LICENCE_NOTE,
        "converted": datetime.date.today().isoformat(),
    }
    tensors = {name: tensor.to(dtype) for name, tensor in checkpoint.tensors.items()}
    write_artifact(out, "teacher", Artifact(asdict(checkpoint.config), provenance, tensors))
    return Conversion(checkpoint.config, provenance, list(tensors), checkpoint.left)


def save_student(student: Student, out: Path) -> None:
    """One file with everything :func:`load_student` needs: encoder, blocks, sizes, preprocessing, provenance."""
    config = {"encoder": asdict(student.encoder.config), "student": asdict(student.config)}
    tensors = student.state_dict() | {CONFIG_TENSOR: config_tensor(student.encoder.config, student.config)}
    write_artifact(out, "student", Artifact(config, student.provenance, tensors))


def config_tensor(encoder: ImageEncoderConfig, student: StudentConfig) -> torch.Tensor:
    """A student's sizes as bytes of JSON, (any,) uint8: for who gets nothing but the tensors of a file."""
    text = json.dumps({"encoder": asdict(encoder), "student": asdict(student)})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def configs_from_tensor(stored: torch.Tensor) -> tuple[ImageEncoderConfig, StudentConfig]:
    """Back from :func:`config_tensor`.

    Raises:
        InputError: It is none.
    """
    try:
        configs = json.loads(bytes(stored.tolist()))
        encoder, student = configs["encoder"], configs["student"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{CONFIG_TENSOR}: unusable sizes ({type(error).__name__})") from error
    return _read_config(CONFIG_TENSOR, ImageEncoderConfig, encoder), _read_config(CONFIG_TENSOR, StudentConfig, student)


def load_any(
    path: str | Path, weights: Weights = "model", teacher_path: str | None = None
) -> tuple[Student | None, Data2Vec2 | None]:
    """Student and teacher of whatever file it is.

    Args:
        path: A teacher's (as for :func:`load_teacher`): no student. An exported student's: a teacher only where
            ``teacher_path`` says which. A training checkpoint's: both.
        weights: Of a teacher's file.
        teacher_path: The student's teacher; default, for a checkpoint, where it was when the student trained.

    Raises:
        InputError: It is none of them, or damaged.
    """
    file = fetch(path if is_remote(path) else _pointed_at(Path(path)))
    if is_safetensors(file) and read_kind(file) == "student":
        return load_student(path), None if teacher_path is None else load_teacher(teacher_path, weights)
    contents = None if is_safetensors(file) else load_untrusted(file)
    if isinstance(contents, dict) and "state" in contents:
        return _load_trained(file, contents, teacher_path)
    if teacher_path is not None:
        raise InputError(f"{path}: is no student, for which teacher {teacher_path} would be")
    return None, load_teacher(path, weights)


def _pointed_at(path: Path) -> Path:
    """The file that a run's pointer names. It may name another one soon, and for a moment in between there is none."""
    for _ in range(POINTER_ATTEMPTS):
        with suppress(OSError):
            return path.resolve(strict=True)
        time.sleep(POINTER_PAUSE)
    return path


def _load_trained(checkpoint: Path, contents: dict[str, Any], teacher_path: str | None) -> tuple[Student, Data2Vec2]:
    """The student of a training checkpoint, with the record of its run, and its teacher.

    The teacher is needed once more, for the frozen encoder, and must be the one that the student was trained with.

    Args:
        checkpoint: A file of ``recipes/train.py``.
        contents: What is in it.
        teacher_path: Where the teacher is now; default where it was when the student trained.

    Raises:
        InputError: It is no such checkpoint, or its teacher is not to be had or another.
    """
    foreign = f"{checkpoint}: not a checkpoint of recipes/train.py"
    try:
        tensors, callbacks = dict(contents["state"]["model"]), dict(contents["state"]["callbacks"])
        record = dict(callbacks["RunRecord"]["record"])
        teacher_file: str = teacher_path or str(record["config"]["teacher"]["checkpoint"])
        weights, trained_with = record["config"]["teacher"]["weights"], record["teacher"]["sha256"]
        sizes: dict[str, Any] = dict(record["config"]["student"]) | {"init": "random"}
        history = list(callbacks.get("ZeroShotRetrieval", {}).get("history", []))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{foreign} ({type(error).__name__}: {error})") from error
    teacher = load_teacher(teacher_file, weights)
    if teacher.provenance["sha256"] != trained_with:
        raise InputError(
            f"{teacher_file}: its sha256 is {teacher.provenance['sha256']}, the student was trained with {trained_with}"
        )
    try:
        student = teacher.build_student(**sizes)
    except (TypeError, ValueError) as error:
        raise InputError(f"{foreign} ({reason(error)})") from error
    blocks = {
        str(name).removeprefix("student."): tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)
    }
    expected = {name: shape for name, shape in _shapes(student).items() if not name.startswith("encoder.")}
    check_tensors(checkpoint, expected, blocks)
    student.load_state_dict(blocks, strict=False)
    student.provenance = {**record, "retrieval": history[-1] if history else None}
    return student.eval(), teacher


def load_student(path: str | Path) -> Student:
    """A student in eval mode and float32, from one file of :func:`save_student`; no teacher is needed.

    Raises:
        InputError: There is no such file, or it holds no student; the message says why.
    """
    artifact = read_artifact(fetch(path), "student")
    encoder_config = _read_config(path, ImageEncoderConfig, artifact.config.get("encoder", {}))
    student_config = _read_config(path, StudentConfig, artifact.config.get("student", {}))
    try:
        with torch.device("meta"):
            shapes = _shapes(Student(ImageEncoder(encoder_config), student_config))
    except ValueError as error:
        raise InputError(f"{path}: unusable sizes in its metadata: {error}") from error
    artifact.tensors.pop(CONFIG_TENSOR, None)  # the metadata says the same
    check_tensors(path, shapes, artifact.tensors)
    student = Student(ImageEncoder(encoder_config).freeze(), student_config, artifact.provenance)
    student.load_state_dict(artifact.tensors)
    return student.eval()


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _read_config(path: str | Path, config_class: type, fields: Any) -> Any:
    """A config from a file's JSON, in which tuples are lists."""
    try:
        if not isinstance(fields, dict):
            raise ValueError(f"expected sizes by name, got {type(fields).__name__}")
        return config_class(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: unusable sizes in its metadata: {error}") from error
