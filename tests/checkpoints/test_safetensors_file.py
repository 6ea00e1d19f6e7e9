"""Teachers are converted, students exported, bit for bit; unusable and altered files are refused in one line."""

import functools
import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import load_checkpoint
from torch import Tensor

import d2v_composer.timm_models  # noqa: F401  (registers the student)
from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.fairseq import convert_teacher
from d2v_composer.checkpoints.load import save_student
from d2v_composer.checkpoints.timm_student import TimmWrapper
from d2v_composer.commands import convert_teacher as convert_command
from d2v_composer.models.backbone import Backbone, Transformer
from d2v_composer.models.configs import height_and_width
from d2v_composer.models.teacher import Teacher
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, refused_by, slow
from steps import random_images


def golden(name: str = "tiny_base") -> Path:
    return GOLDEN / f"{name}.pt"


def read_metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def rewrite(path: Path, **metadata: str) -> Path:
    """Replace some of the file's metadata."""
    save_file(load_file(path), path, read_metadata(path) | metadata)
    return path


def inputs_of(model: Backbone) -> torch.Tensor:
    """Return the same images or clips in each call."""
    torch.manual_seed(0)
    return model.encoder.noise(3)


def targets(teacher: Teacher) -> torch.Tensor:
    return teacher.targets(teacher.encode(inputs_of(teacher)))


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    """A teacher with a scale of ALiBi for each layer and head."""
    path = tmp_path / "teacher.safetensors"
    convert_teacher(golden("tiny_alibi"), path)
    return path


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A student that is narrower than its teacher."""
    path = tmp_path / "student.safetensors"
    torch.manual_seed(0)
    save_student(load_teacher(golden("tiny_alibi")).build_student(depth=1, embed_dim=20), path)
    return path


# Converting.


@pytest.mark.parametrize(
    ("name", "weights"),
    [("tiny_base", "model"), ("tiny_alibi", "ema"), ("tiny_topk_noprenet", "model"), ("audio_base", "model")],
)
def test_a_converted_teacher_is_the_same_bit_for_bit(name: str, weights: Any, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "teacher.safetensors"
    written, _ = convert_teacher(golden(name), path, weights)
    assert ("MIT" in written.provenance["license"]) == (name == "audio_base")
    original, teacher = load_teacher(golden(name), weights), load_teacher(path, weights)
    assert teacher.config == original.config == written.config
    assert torch.equal(targets(teacher), targets(original))
    assert files_in(path.parent) == [path.name]
    other: Any = "ema" if weights == "model" else "model"
    with pytest.raises(InputError, match=f"has {weights} weights, but no {other} weights"):
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
    digest = load_teacher(golden(), "ema").provenance["sha256"]
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


def test_another_kind_of_file_is_refused(converted: Path, exported: Path, tmp_path: Path) -> None:
    assert "is a student file; expected a teacher file" in refused_by(load_teacher, exported)
    assert "is a teacher file; expected a student file" in refused_by(load_student, converted)
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    for load in (load_teacher, load_student):
        assert "is not a d2v_composer file" in refused_by(load, tmp_path / "other.safetensors")


# Students.


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tiny_alibi", {"mlp_ratio": 2.0}),
        ("tiny_topk_noprenet", {"alibi": False}),
        ("tiny_base", {"normalization": "layer"}),
        ("audio_base", {"final_layer_norm": True}),
    ],
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
    assert (loaded.config, loaded.encoder.config) == (student.config, student.encoder.config)
    assert not loaded.training
    assert not loaded.train().encoder.training
    assert all(parameter.requires_grad for parameter in loaded.blocks.parameters())
    assert not any(parameter.requires_grad for parameter in loaded.encoder.parameters())
    inputs = inputs_of(student)
    expected, actual = student.embed_all(inputs), loaded.embed_all(inputs)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    model: Any = timm.create_model("d2v2_student", checkpoint_path=str(path), representation="layer_mean").eval()
    layer_mean = expected[f"layer_mean_{student.default_pooling}"]
    assert torch.equal(model(model.student.encoder.normalized(inputs)).detach(), layer_mean)


# Files with one altered size: each is refused, or its model embeds as before.

Sizes = dict[str, Any]

# As JSON; NaN is not JSON, but Python reads it.
HOSTILE = {
    "null": "null",
    "true": "true",
    "0": "0",
    "-1": "-1",
    "a fraction": "0.37",
    "NaN": "NaN",
    "beyond a double": "1e999",
    "many": "1000",
    "as wide as may be": "65536",
    "a number as text": '"3"',
    "lines": '"a\\nb"',
    "huge numbers": "[1e300, 1e300, 1e300]",
    "huge shape": "[1000000, 1, 1000000, 1, 1]",
    "nests without end": "[" * 20_000 + "]" * 20_000,
    "a section": '{"a": 1}',
}
PLACE = "@place@"
MAY_DIFFER = {("num_alibi_heads", "0"): "other embeddings"}  # no tensor contradicts it


def alterations(sizes: Sizes, section: Sizes) -> Iterator[tuple[str, str, str]]:
    """Yield the name of each size in a section of the sizes, the alteration, and the JSON of the altered sizes."""
    for name, value in list(section.items()):
        section[name] = PLACE
        for what, hostile in HOSTILE.items():
            yield name, what, json.dumps(sizes).replace(f'"{PLACE}"', hostile)
        del section[name]
        yield name, "dropped", json.dumps(sizes)
        section[f"{name}s"] = value
        yield name, "misspelt", json.dumps(sizes)
        del section[f"{name}s"]
        section[name] = value
        if isinstance(value, dict):
            yield from alterations(sizes, value)


@functools.cache
def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    return load_file(path), read_metadata(path)


def sizes_of(path: Path) -> Sizes:
    tensors, metadata = contents(path)
    stored = tensors.get("config_json")
    return json.loads(metadata["config"] if stored is None else stored.numpy().tobytes())


def with_sizes(source: Path, text: str) -> Path:
    """Write the file with other sizes: a student's are in its tensor, a teacher's in its metadata."""
    tensors, metadata = contents(source)
    if "config_json" in tensors:
        tensors = tensors | {"config_json": torch.tensor(list(text.encode()), dtype=torch.uint8)}
    path = source.with_name("altered.safetensors")
    save_file(tensors, path, metadata | {"config": text})
    return path


def embeddings(model: Transformer) -> Tensor:
    """Return all raw embeddings of the same images, as uint8 and as normalized floats."""
    size, _ = height_and_width(model.encoder.config.image_size)
    with torch.inference_mode():
        both = model.embed_all(random_images(2, size + 8)), model.embed_all(random_images(2, size) / 255)
        return torch.cat([result[name] for result in both for name in result if name != "embedding"])


def timm_model(path: Path) -> Transformer:
    """Load like create_model with a checkpoint_path."""
    model = TimmWrapper()
    load_checkpoint(model, str(path))
    return model.eval().student


def outcome(load: Callable[[Path], Any], path: Path, expected: Tensor) -> str:
    """Return "refused", "as before", or what is wrong."""
    try:
        result = embeddings(load(path))
    except InputError as error:
        start = "config_json " if load is timm_model else str(path)
        is_short_line = str(error).startswith(start) and "\n" not in str(error) and len(str(error)) <= 500
        return "refused" if is_short_line else str(error)
    except Exception as error:  # noqa: BLE001
        return repr(error)[:200]
    return "as before" if torch.allclose(result, expected, atol=1e-4) else "other embeddings"


# Of 17 alterations of each size; one in five has all of them, and all sizes.
@pytest.mark.parametrize("step", [5, slow(1)])
@pytest.mark.parametrize("load", [load_teacher, load_student, timm_model])
def test_altered_sizes_are_refused(load: Callable[[Path], Any], step: int, converted: Path, exported: Path) -> None:
    source = converted if load is load_teacher else exported
    expected, sizes = embeddings(load(source)), sizes_of(source)
    outcomes = {
        (name, what): outcome(load, with_sizes(source, text), expected)
        for name, what, text in islice(alterations(sizes, sizes), 0, None, step)
    }
    wrong = {place: what for place, what in outcomes.items() if what not in ("refused", "as before")}
    assert wrong.items() <= MAY_DIFFER.items()
    assert list(outcomes.values()).count("refused") > len(outcomes) / 2


QKV = "blocks.0.attn.qkv.weight"
CHANGED: dict[str, Any] = {
    "missing": None,
    "not finite": torch.full((60, 20), torch.nan),
    "another shape": torch.ones(20, 60),
    "int8": torch.ones(60, 20, dtype=torch.int8),
}


@pytest.mark.parametrize("load", [load_student, timm_model])
def test_other_tensors_are_refused_and_16_bits_are_not(load: Callable[[Path], Any], exported: Path) -> None:
    """By timm, too, whose own loading is not strict about dtypes."""
    tensors, metadata = contents(exported)
    path = exported.with_name("other.safetensors")
    for what, changed in CHANGED.items():
        new_tensors = {name: tensor for name, tensor in (tensors | {QKV: changed}).items() if tensor is not None}
        save_file(new_tensors, path, metadata)
        with pytest.raises(InputError, match=re.escape(QKV)) as caught:
            load(path)
        assert "\n" not in str(caught.value), what
    for stored in (torch.zeros(1, 8, dtype=torch.uint8), torch.tensor(7), torch.zeros(5 << 20, dtype=torch.uint8)):
        save_file(tensors | {"config_json": stored}, path, metadata)
        with pytest.raises(InputError, match=r"^config_json cannot be read: "):
            timm_model(path)
    save_file(tensors | {QKV: tensors[QKV].half()}, path, metadata)
    torch.testing.assert_close(embeddings(load(path)), embeddings(load(exported)), atol=0.02, rtol=0)
