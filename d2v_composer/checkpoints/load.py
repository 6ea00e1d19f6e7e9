"""Teachers and students from files and back."""

import datetime
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from d2v_composer.checkpoints.check_tensors import check_num_blocks, check_tensors, expected_shapes
from d2v_composer.checkpoints.fairseq import Weights, read_fairseq_checkpoint
from d2v_composer.checkpoints.pointer import read_newest
from d2v_composer.checkpoints.safe_pickle import load_untrusted
from d2v_composer.checkpoints.safetensors_file import (
    Artifact,
    is_safetensors,
    read_artifact,
    read_kind,
    sha256,
    write_artifact,
)
from d2v_composer.checkpoints.stored_config import (
    CONFIG_TENSOR,
    check_student,
    config_tensor,
    parse_config_tensor,
    read_config,
    shapes_of,
)
from d2v_composer.models.data2vec2 import Data2Vec2, Data2Vec2Config
from d2v_composer.models.image_encoder import ImageEncoder
from d2v_composer.models.student import Student
from d2v_composer.system.addresses import file_name
from d2v_composer.system.atomic_files import check_out_file
from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import fetch, is_remote
from d2v_composer.system.retry import reason

__all__ = [
    "Conversion",
    "convert_teacher",
    "load_any",
    "load_student",
    "load_teacher",
    "save_student",
]


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
    stored_weights, source_hash = (artifact.provenance.get(name) for name in ("weights", "sha256"))
    if stored_weights not in get_args(Weights) or not isinstance(source_hash, str):
        raise InputError(f"{path}: unusable metadata: its provenance does not give weights and sha256 of its source")
    if stored_weights != weights:
        raise InputError(f"{path}: was converted with --weights {stored_weights}, and holds no {weights} weights")
    config = read_config(path, Data2Vec2Config, artifact.config)
    check_num_blocks(path, config.prenet_depth + config.depth, artifact.tensors)
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
    check_out_file(out)
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

    def load(file: Path) -> tuple[Student | None, Data2Vec2 | None]:
        return _load_file(path, fetch(file), weights, teacher_path)

    return _load_file(path, fetch(path), weights, teacher_path) if is_remote(path) else read_newest(Path(path), load)


def _load_file(
    path: str | Path, file: Path, weights: Weights, teacher_path: str | None
) -> tuple[Student | None, Data2Vec2 | None]:
    """:func:`load_any`, of the file on this machine that ``path`` stands for."""
    if is_safetensors(file) and read_kind(file) == "student":
        return load_student(path), None if teacher_path is None else load_teacher(teacher_path, weights)
    contents = None if is_safetensors(file) else load_untrusted(file)
    if isinstance(contents, dict) and "state" in contents:
        return _load_trained(file, contents, teacher_path)
    if teacher_path is not None:
        raise InputError(f"{path}: is no student, for which teacher {teacher_path} would be")
    return None, load_teacher(path, weights)


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
    blocks = {
        str(name).removeprefix("student."): tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)
    }
    try:
        with torch.device("meta"):  # no memory for sizes that the tensors do not bear out
            shapes = shapes_of(teacher.build_student(**sizes))
    except (TypeError, ValueError) as error:
        raise InputError(f"{foreign} ({reason(error)})") from error
    expected = {name: shape for name, shape in shapes.items() if not name.startswith("encoder.")}
    check_tensors(checkpoint, expected, blocks)
    student = teacher.build_student(**sizes)
    student.load_state_dict(blocks, strict=False)
    student.provenance = {**record, "retrieval": history[-1] if history else None}
    return student.eval(), teacher


def load_student(path: str | Path) -> Student:
    """A student in eval mode and float32, from one file of :func:`save_student`; no teacher is needed.

    Raises:
        InputError: There is no such file, or it holds no student; the message says why.
    """
    artifact = read_artifact(fetch(path), "student")
    stored = artifact.tensors.pop(CONFIG_TENSOR, None)
    encoder_config, student_config = check_student(path, artifact.config, artifact.tensors)
    if stored is not None:  # what timm reads
        try:
            agree = parse_config_tensor(stored) == artifact.config
        except ValueError as error:
            raise InputError(f"{path}: tensor {CONFIG_TENSOR}: unusable sizes ({reason(error)})") from error
        if not agree:
            raise InputError(f"{path}: its metadata and its tensor {CONFIG_TENSOR} give other sizes")
    student = Student(ImageEncoder(encoder_config).freeze(), student_config, artifact.provenance)
    student.load_state_dict(artifact.tensors)
    return student.eval()
