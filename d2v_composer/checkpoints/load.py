"""Load teachers and students from files, and write them."""

import datetime
import shlex
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from d2v_composer.checkpoints.check_tensors import check_teacher, check_tensors, shapes_of
from d2v_composer.checkpoints.composer_checkpoint import is_trained
from d2v_composer.checkpoints.fairseq import read_fairseq_checkpoint
from d2v_composer.checkpoints.headline import DEFAULT_HEADLINE, stored_headline
from d2v_composer.checkpoints.pointer import LATEST, read_newest
from d2v_composer.checkpoints.safe_pickle import load_untrusted
from d2v_composer.checkpoints.safetensors_file import (
    ModelFile,
    is_safetensors,
    read_kind,
    read_model_file,
    sha256,
    write_model_file,
)
from d2v_composer.checkpoints.stored_config import (
    CONFIG_TENSOR,
    check_student,
    config_tensor,
    parse_config_tensor,
    read_config,
)
from d2v_composer.models.data2vec2 import Data2Vec2, Data2Vec2Config
from d2v_composer.models.image_encoder import ImageEncoder
from d2v_composer.models.names import Weights
from d2v_composer.models.student import Student
from d2v_composer.system.addresses import file_name
from d2v_composer.system.atomic_files import check_out_file
from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import fetch, is_remote
from d2v_composer.system.retry import reason

__all__ = ["ConvertedTeacher", "convert_teacher", "load_any", "load_student", "load_teacher", "save_student"]

LICENCE_NOTE = "as the source's; the data2vec 2.0 checkpoints released by Meta are CC BY-NC 4.0"


def load_teacher(path: str | Path, weights: Weights = "model") -> Data2Vec2:
    """Load a frozen teacher, in eval mode and float32.

    Args:
        path: fairseq's .pt or a file of ``convert_teacher``: a local path, https://, or an object store's address
            (fetched once and cached).
        weights: ``model``, or ``ema`` for the moving average. A converted file holds one of the two.

    Raises:
        InputError: The file does not exist, or is not a supported teacher.
    """
    file = _fetch_model(path)
    if not is_safetensors(file):
        config, tensors, _ = read_fairseq_checkpoint(file, weights)
        provenance = _provenance(path, file, weights) | {"licence": LICENCE_NOTE}
        return _build_teacher(config, tensors, provenance)
    stored = read_model_file(file, "teacher")
    stored_weights, source_hash = (stored.provenance.get(name) for name in ("weights", "sha256"))
    if stored_weights not in get_args(Weights) or not isinstance(source_hash, str):
        raise InputError(f"{path}: unusable metadata: its provenance lacks weights or sha256 of its source")
    if stored_weights != weights:
        raise InputError(f"{path}: was converted with --weights {stored_weights}, and holds no {weights} weights")
    config = read_config(path, Data2Vec2Config, stored.config)
    check_teacher(path, config, stored.tensors)
    return _build_teacher(config, stored.tensors, stored.provenance)


def _fetch_model(path: str | Path) -> Path:
    """Return a local path as :func:`fetch`, and say what to name instead of a run's folder or a YAML."""
    if not is_remote(path) and (newest := Path(path) / LATEST).exists():
        raise InputError(f"{path}: is the folder of a run, not a model's file; its newest checkpoint is {newest}")
    if str(path).endswith((".yaml", ".yml")):
        raise InputError(f"{path}: is a YAML, expected the file of a model")
    return fetch(path)


def _provenance(source: str | Path, file: Path, weights: Weights) -> dict[str, Any]:
    return {"source": file_name(source), "sha256": sha256(file), "weights": weights}


def _build_teacher(config: Data2Vec2Config, tensors: dict[str, Tensor], provenance: dict[str, Any]) -> Data2Vec2:
    teacher = Data2Vec2(config, provenance)
    teacher.load_state_dict(tensors)
    return teacher


class ConvertedTeacher(NamedTuple):
    """Report of :func:`convert_teacher`."""

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
) -> ConvertedTeacher:
    """Convert fairseq's checkpoint to a safetensors file.

    Args:
        source: As :func:`load_teacher`'s path.
        out: The file to write.
        weights: The weights to keep.
        dtype: Stored dtype; a loaded teacher is float32 in any case.
        licence: A note on the weights' licence for the metadata.

    Raises:
        InputError: As :func:`load_teacher`; or ``out`` cannot be written.
    """
    check_out_file(out)
    file = _fetch_model(source)
    if is_safetensors(file):
        raise InputError(f"{source}: is a safetensors file already, expected a fairseq checkpoint")
    checkpoint = read_fairseq_checkpoint(file, weights)
    provenance = _provenance(source, file, weights) | {
        "dtype": str(dtype).removeprefix("torch."),
        "licence": licence or LICENCE_NOTE,
        "converted": datetime.date.today().isoformat(),
    }
    tensors = {name: tensor.to(dtype) for name, tensor in checkpoint.tensors.items()}
    write_model_file(out, "teacher", ModelFile(asdict(checkpoint.config), provenance, tensors))
    return ConvertedTeacher(checkpoint.config, provenance, list(tensors), checkpoint.left)


def save_student(student: Student, out: Path) -> None:
    """Write a student with all that :func:`load_student` needs: encoder, blocks, sizes, preprocessing, provenance."""
    config = {"encoder": asdict(student.encoder.config), "student": asdict(student.config)}
    headline = stored_headline(student.provenance) or DEFAULT_HEADLINE
    tensors = student.state_dict() | {CONFIG_TENSOR: config_tensor(student.encoder.config, student.config, headline)}
    write_model_file(out, "student", ModelFile(config, student.provenance, tensors))


def load_student(path: str | Path) -> Student:
    """Load a student, in eval mode and float32, from a file of :func:`save_student`; no teacher is needed.

    Raises:
        InputError: The file does not exist, or does not hold a student.
    """
    file = _fetch_model(path)
    if not is_safetensors(file):
        _refuse_checkpoint(path, file)
    stored = read_model_file(file, "student")
    sizes_for_timm = stored.tensors.pop(CONFIG_TENSOR, None)
    encoder_config, student_config = check_student(path, stored.config, stored.tensors)
    if sizes_for_timm is not None:
        try:
            agree = parse_config_tensor(sizes_for_timm).sizes == stored.config
        except ValueError as error:
            raise InputError(f"{path}: tensor {CONFIG_TENSOR}: unusable sizes ({reason(error)})") from error
        if not agree:
            raise InputError(f"{path}: its metadata and its tensor {CONFIG_TENSOR} give different sizes")
    student = Student(ImageEncoder(encoder_config).freeze(), student_config, stored.provenance)
    student.load_state_dict(stored.tensors)
    return student.eval()


def _refuse_checkpoint(path: str | Path, file: Path) -> None:
    """Refuse a training checkpoint, or a teacher's, in place of an exported student."""
    contents: Any = None
    with suppress(InputError):  # neither of them
        contents = load_untrusted(file)
    if is_trained(contents):
        command = f"python recipes/export_student.py {shlex.quote(str(path))} student.safetensors"
        raise InputError(f"{path}: is a training checkpoint: export its student first: {command}")
    if isinstance(contents, dict) and "model" in contents:
        raise InputError(f"{path}: is a teacher's checkpoint, read by load_teacher; expected an exported student")


def load_any(
    path: str | Path,
    weights: Weights = "model",
    teacher_path: str | None = None,
    teacher_option: str = "--teacher PATH",
) -> tuple[Student | None, Data2Vec2 | None]:
    """Load the student and the teacher of any supported file.

    Args:
        path: A teacher's file, as for :func:`load_teacher`: no student. An exported student's: a teacher only with
            ``teacher_path``. A training checkpoint: both.
        weights: Of a teacher's file.
        teacher_path: The student's teacher; for a checkpoint, the default is the path used in training.
        teacher_option: What the user sets ``teacher_path`` with, named if that path holds no teacher any more.

    Raises:
        InputError: The file is corrupt, or not supported.
    """

    def load(file: Path) -> tuple[Student | None, Data2Vec2 | None]:
        return _load_file(path, _fetch_model(file), weights, teacher_path, teacher_option)

    return load(_fetch_model(path)) if is_remote(path) else read_newest(Path(path), load)


def _load_file(
    path: str | Path, file: Path, weights: Weights, teacher_path: str | None, teacher_option: str
) -> tuple[Student | None, Data2Vec2 | None]:
    """Load ``file``, the local copy of ``path``."""
    if is_safetensors(file) and read_kind(file) == "student":
        return load_student(path), None if teacher_path is None else load_teacher(teacher_path, weights)
    contents = None if is_safetensors(file) else load_untrusted(file)
    if is_trained(contents):
        return _load_trained(file, contents, teacher_path, teacher_option)
    if teacher_path is not None:
        raise InputError(f"{path}: is not a student, so a teacher ({teacher_path}) is not allowed")
    return None, load_teacher(path, weights)


def _load_trained(
    checkpoint: Path, contents: dict[str, Any], teacher_path: str | None, teacher_option: str
) -> tuple[Student, Data2Vec2]:
    """Build a training checkpoint's student, with its run's record as provenance, and its teacher.

    The teacher is loaded for its frozen encoder, and must be the one of the training.
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
    try:
        teacher = load_teacher(teacher_file, weights)
        if (found := teacher.provenance["sha256"]) != trained_with:
            raise InputError(f"{teacher_file}: its sha256 is {found}, the student was trained with {trained_with}")
    except InputError as error:
        if teacher_path is not None:
            raise
        raise InputError(
            f"{error}; if the teacher of {checkpoint} has moved, name its file: {teacher_option}"
        ) from error
    blocks = {
        str(name).removeprefix("student."): tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)
    }
    try:
        shapes = shapes_of(lambda: teacher.build_student(**sizes))
    except (TypeError, ValueError) as error:
        raise InputError(f"{foreign} ({reason(error)})") from error
    expected = {name: shape for name, shape in shapes.items() if not name.startswith("encoder.")}
    check_tensors(checkpoint, expected, blocks)
    student = teacher.build_student(**sizes)
    student.load_state_dict(blocks, strict=False)
    student.provenance = {**record, "retrieval": history[-1] if history else None}
    return student.eval(), teacher
