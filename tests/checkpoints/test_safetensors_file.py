"""Teachers are converted, fetched and cached, students exported; unusable files are refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.fairseq import convert_teacher
from d2v_composer.checkpoints.load import save_student
from d2v_composer.commands import convert_teacher as convert_command
from d2v_composer.models.student import Student
from d2v_composer.models.teacher import Teacher
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, refused_by
from steps import random_images

NAMES = ["tiny_base", "tiny_alibi", "tiny_topk_noprenet"]
QKV = "blocks.1.attn.qkv.weight"


def golden(name: str = "tiny_base") -> Path:
    return GOLDEN / f"{name}.pt"


def read_metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def rewrite(path: Path, **metadata: str) -> Path:
    """Replace some of the file's metadata."""
    save_file(load_file(path), path, read_metadata(path) | metadata)
    return path


def targets(teacher: Teacher) -> torch.Tensor:
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return teacher.targets(teacher.encode(images))


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    path = tmp_path / "teacher.safetensors"
    convert_teacher(golden(), path)
    return path


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    path = tmp_path / "student.safetensors"
    save_student(load_teacher(golden()).build_student(depth=2), path)
    return path


# Converting.


@pytest.mark.parametrize(("name", "weights"), [("tiny_base", "model"), ("tiny_alibi", "ema"), (NAMES[2], "model")])
def test_a_converted_teacher_is_the_same_bit_for_bit(name: str, weights: Any, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "teacher.safetensors"
    written, _ = convert_teacher(golden(name), path, weights)
    original, teacher = load_teacher(golden(name), weights), load_teacher(path, weights)
    assert teacher.config == original.config == written.config
    assert torch.equal(targets(teacher), targets(original))
    assert files_in(path.parent) == [path.name]
    other: Any = "ema" if weights == "model" else "model"
    with pytest.raises(InputError, match=f"--weights {weights}, and has no {other} weights"):
        load_teacher(path, other)


def test_a_teacher_stored_in_16_bits_is_float32_and_close(tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    convert_teacher(golden(), path, dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    teacher, original = load_teacher(path), load_teacher(golden())
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    torch.testing.assert_close(targets(teacher), targets(original), rtol=0, atol=0.02)


def test_metadata_and_report_name_source_and_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "teacher.safetensors"
    arguments = [golden(), path, "--weights", "ema", "--license", "none, random numbers"]
    convert_command.main([str(part) for part in arguments])
    provenance = json.loads(read_metadata(path)["provenance"])
    digest = hashlib.sha256(golden().read_bytes()).hexdigest()
    expected = {"source": "tiny_base.pt", "sha256": digest, "weights": "ema", "license": "none, random numbers"}
    assert expected.items() <= provenance.items()
    assert load_teacher(path, "ema").provenance == provenance
    stored = torch.load(golden(), weights_only=True)["model"]["_ema"]
    decoder = {name for name in stored if ".decoder." in name}
    printed = capsys.readouterr().out
    assert f"used {len(stored) - len(decoder)} tensors" in printed
    for group in {name.rsplit(".", 1)[0] for name in decoder}:
        assert group in printed.partition(f"left {len(decoder)} tensors")[2]


# Corrupt files, other contents.


def test_truncated_files_and_other_metadata_are_refused(converted: Path, exported: Path) -> None:
    for load, path in ((load_teacher, converted), (load_student, exported)):
        content = path.read_bytes()
        for fraction in (0.0, 0.01, 0.999):
            path.write_bytes(content[: int(fraction * len(content))])
            refused_by(load, path)
        for metadata in ({"provenance": ""}, {"provenance": "[]"}):
            path.write_bytes(content)
            refused_by(load, rewrite(path, **metadata))
    for config in ("", "[]", '{"depth": 3}', "[" * 100_000):
        refused_by(load_teacher, rewrite(converted, config=config))


@pytest.mark.parametrize("version", ["1", "10"])
def test_a_file_of_another_format_version_is_refused(version: str, converted: Path) -> None:
    rewrite(converted, format_version=version)
    assert f"its format version is {version}; this package reads 2" in refused_by(load_teacher, converted)


def test_the_other_kind_of_file_is_refused(converted: Path, exported: Path) -> None:
    assert "is a student file; expected a teacher file" in refused_by(load_teacher, exported)
    assert "is a teacher file; expected a student file" in refused_by(load_student, converted)


def test_other_programs_files_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    for load in (load_teacher, load_student):
        assert "is not a d2v_composer file" in refused_by(load, tmp_path / "other.safetensors")


# Students.


IMAGES = random_images(3, size=40)


def embeddings(student: Student) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return student.embed_all(IMAGES)


@pytest.mark.parametrize(
    ("name", "options"),
    [("tiny_alibi", {"mlp_ratio": 2.0}), (NAMES[2], {"alibi": False}), ("tiny_base", {"normalization": "layer"})],
)
def test_an_exported_student_is_the_same(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """In timm, too."""
    source, path = tmp_path / "teacher.pt", tmp_path / "new" / "student.safetensors"
    source.write_bytes(golden(name).read_bytes())
    student = load_teacher(source).build_student(depth=2, **options)
    save_student(student, path)
    source.unlink()
    assert files_in(path.parent) == [path.name]
    loaded = load_student(path)
    assert loaded.config == student.config
    assert not loaded.training
    assert not loaded.train().encoder.training
    assert all(parameter.requires_grad for parameter in loaded.blocks.parameters())
    assert not any(parameter.requires_grad for parameter in loaded.encoder.parameters())
    expected, actual = embeddings(student), embeddings(loaded)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    model: Any = timm.create_model("d2v2_student", checkpoint_path=str(path), representation="layer_mean").eval()
    assert torch.equal(model(model.encoder.prepare(IMAGES)).detach(), expected[f"layer_mean_{student.default_pooling}"])
