"""Load and convert the files of data2vec 2.0 teachers: fairseq's checkpoints, and our own of ``convert_teacher``."""

import datetime
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from d2v_composer.checkpoints.check_tensors import check_teacher
from d2v_composer.checkpoints.fairseq import read_fairseq_checkpoint
from d2v_composer.checkpoints.pointer import fetch_model
from d2v_composer.checkpoints.safetensors_file import (
    ModelFile,
    is_safetensors,
    read_model_file,
    sha256,
    write_model_file,
)
from d2v_composer.checkpoints.stored_config import read_config
from d2v_composer.models.data2vec2 import Data2Vec2, Data2Vec2Config
from d2v_composer.models.names import Weights
from d2v_composer.system.addresses import file_name
from d2v_composer.system.atomic_files import check_out_file
from d2v_composer.system.errors import InputError

__all__ = ["ConvertedTeacher", "convert_teacher", "load_data2vec2"]

LICENCE_NOTE = "as the source's; the data2vec 2.0 checkpoints released by Meta are CC BY-NC 4.0"


def load_data2vec2(path: str | Path, weights: Weights) -> Data2Vec2:
    """Load a frozen teacher, see :func:`~d2v_composer.checkpoints.load.load_teacher`.

    Raises:
        InputError: The file does not exist, or is not a supported teacher.
    """
    file = fetch_model(path)
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
        source: As :func:`load_data2vec2`'s path.
        out: The file to write.
        weights: The weights to keep.
        dtype: Stored dtype; a loaded teacher is float32 in any case.
        licence: A note on the weights' licence for the metadata.

    Raises:
        InputError: As :func:`load_data2vec2`; or ``out`` cannot be written.
    """
    check_out_file(out)
    file = fetch_model(source)
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
