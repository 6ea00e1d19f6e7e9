"""A teacher is its weights as chosen, its preprocessing, and what it computes: not its file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.load import save_student
from d2v_composer.commands import align, convert_teacher, random_teacher
from d2v_composer.config.reference import load_any
from d2v_composer.embedding.index import read_index
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, encoded_image, write_files
from small_vits import random_vit

TEACHER = GOLDEN / "tiny_base.pt"


def student_of(teacher: Any, path: Path) -> str:
    """Return the path of a file with a student of a teacher."""
    torch.manual_seed(0)
    save_student(teacher.build_student(depth=1), path)
    return str(path)


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_align_tells_the_weights_in_one_file_apart(weights: Any, tmp_path: Path) -> None:
    """--to TEACHER.pt is its weights 'model'."""
    student = student_of(load_teacher(TEACHER, weights), tmp_path / "student.safetensors")
    photos = write_files(tmp_path / "photos", {f"{number:03}.jpg": encoded_image(number) for number in range(100)})
    out = tmp_path / "out.safetensors"
    align.main([student, str(photos), str(out), "--to", str(TEACHER), "--workers", "0"])
    names_the_file = str(TEACHER) in json.dumps(load_student(out).provenance["alignment"])
    assert names_the_file == (weights == "ema")  # else it names the run's own teacher


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_converted_file_is_the_original(dtype: str, tmp_path: Path) -> None:
    student, converted = student_of(load_teacher(TEACHER), tmp_path / "student.safetensors"), tmp_path / "t.safetensors"
    convert_teacher.main([str(TEACHER), str(converted), "--dtype", dtype])
    assert load_any(student, teacher=str(converted))[1] is not None


def test_a_timm_teacher_that_is_made_again_is_the_same(tmp_path: Path) -> None:
    """Its file has other metadata, or another format."""
    model = "timm/vit_tiny_patch16_224"
    first, again, stored = (tmp_path / name for name in ("first.safetensors", "again.safetensors", "stored.pt"))
    for path in (first, again):
        random_teacher.main([model, str(path)])
    torch.save(load_file(first), stored)
    hashes = {load_teacher(path, model=model, image_size=112).provenance["sha256"] for path in (first, again, stored)}
    assert len(hashes) == 1


def test_preprocessing_is_part_of_a_teacher(tmp_path: Path) -> None:
    torch.save(random_vit("test_vit").state_dict(), tmp_path / "vit.pt")
    hashes = {
        load_teacher(tmp_path / "vit.pt", model="timm/test_vit", image_size=size).provenance["sha256"]
        for size in (32, 64)
    }
    assert len(hashes) == 2


def test_outputs_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    contents = torch.load(TEACHER, weights_only=True)
    contents["model"]["blocks.1.norm2.weight"] = torch.full((48,), 3e38)
    torch.save(contents, path := tmp_path / "teacher.pt")
    with pytest.raises(InputError, match=f"^{path}: the teacher's outputs are not finite$"):
        load_teacher(path)


@pytest.mark.parametrize("scale", [1e20, 1e-14, float("nan"), float("inf")])
def test_rows_of_an_index_have_a_length_in_float32(scale: float, tmp_path: Path) -> None:
    np.save(
        tmp_path / "rows.npy", np.array([[1, 2], [1, scale * 2]] if scale > 1 else scale * np.ones((2, 2)), np.float32)
    )
    np.save(tmp_path / "rows.ids.npy", np.array(["a", "b"]))
    with pytest.raises(
        InputError, match=r"expected only zeros, or finite numbers whose largest magnitude is from 1e-9 to 1e15$"
    ):
        read_index(str(tmp_path / "rows.npy"))


def test_an_index_has_a_known_suffix(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("id,embedding")
    with pytest.raises(InputError, match=r"rows.csv cannot be read: expected a file named NAME.npy or NAME.parquet$"):
        read_index(str(tmp_path / "rows.csv"))
