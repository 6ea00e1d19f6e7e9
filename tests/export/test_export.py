"""ONNX and torch.export programs take what the student takes, and compute the same, or are not written."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor

from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.load import save_student
from d2v_composer.commands import export as export_student
from d2v_composer.export import programs
from d2v_composer.models.backbone import Backbone
from d2v_composer.models.configs import SAMPLE_RATE, height_and_width
from d2v_composer.models.student import Student
from d2v_composer.models.timm_teacher import TimmTeacher, teacher_config
from d2v_composer.system.errors import InputError, RunError
from helpers import GOLDEN, QUICKSTART, encoded_image, saved, slow, write_files
from small_students import random_student, student_with_program
from small_vits import RESAMPLED_BILINEARLY, random_vit
from steps import random_images

SMALL_VITS = [*RESAMPLED_BILINEARLY, "small_beit", "small_mixed_rope", "small_dinov3", "small_dinov3_without_bias"]
CONVOLUTIONS = ["resnet10t", "convnext_atto", "mobilenetv4_conv_small_035", "test_efficientnet", "repvit_m0_9"]
PHOTOS = QUICKSTART / "cifar10" / "test"

# The shortest clips, of two frames, and longer than the second with which a program is traced; in samples.
LENGTHS = 720, 8000, SAMPLE_RATE + 4123


def export(*arguments: str | Path) -> None:
    export_student.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a student of one block and its ONNX program."""
    return student_with_program(tmp_path_factory)


SLOW = [slow(name) for name in ("narrow", "exported", "audio_options")]


@pytest.fixture(scope="module")
def narrow(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that is narrower than its encoder."""
    path, wide = tmp_path_factory.mktemp("narrow") / "student.safetensors", load_student(exported)
    torch.manual_seed(0)
    save_student(Student(wide.encoder, wide.config.changed(embed_dim=20), wide.provenance), path)
    return path


@pytest.fixture(scope="module", params=["audio_base", *SLOW])
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student on an encoder of sound with a block with a learned scale; the run's; the narrow one."""
    if request.param in ("exported", "narrow"):
        return request.getfixturevalue(request.param)
    path = tmp_path_factory.mktemp(request.param) / "student.safetensors"
    torch.manual_seed(0)
    teacher = load_teacher(GOLDEN / f"{request.param}.pt", first_blocks=1)
    save_student(teacher.build_student(depth=1, normalization="layer"), path)
    return path


def batches_for(student: Backbone) -> list[Tensor]:
    """Return batches of several sizes: normalized images, or clips of several lengths."""
    generator = torch.Generator().manual_seed(0)
    if student.encoder.input_name == "waveforms":
        sizes = [(1, 720), *((3, length) for length in LENGTHS)]
        return [0.1 * torch.randn(size, generator=generator) for size in sizes]
    shape = height_and_width(student.encoder.config.image_size)
    return [torch.randn(size, 3, *shape, generator=generator) for size in (5, 1)]


def load(path: Path) -> tuple[Any, dict[str, str]]:
    """Return a program, and what it says of itself: ``embedding`` and ``preprocessing``."""
    if path.suffix == ".pt2":
        loaded = torch.export.load(path, extra_files=(extra := {"embedding": "", "preprocessing.json": ""}))
        return loaded.module(), {name.removesuffix(".json"): text for name, text in extra.items()}
    session = onnxruntime.InferenceSession(path)
    [given], [returned] = session.get_inputs(), session.get_outputs()
    assert (given.name, returned.name) in (("images", "embedding"), ("waveforms", "embedding"))

    def program(batch: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(session.run(None, {given.name: batch.numpy()})[0]))

    return program, session.get_modelmeta().custom_metadata_map


# Control flow, and operators whose outputs' shapes depend on data.
DATA_DEPENDENT = {"If", "Loop", "Scan", "NonZero", "Unique", "Compress", "NonMaxSuppression"}
FLOAT64 = 11  # in ONNX


def check_graph(program: Path, free_axes: set[int]) -> None:
    """Check that a program has nothing that some runtimes refuse or miscompute, and which axes have any size."""
    model = onnx.load(program)
    graph, sizes = model.graph, enumerate(model.graph.input[0].type.tensor_type.shape.dim)
    assert {opset.domain for opset in model.opset_import} == {""}
    assert not DATA_DEPENDENT.intersection(node.op_type for node in graph.node)
    assert {axis for axis, size in sizes if not size.HasField("dim_value")} == free_axes
    assert FLOAT64 not in [value.type.tensor_type.elem_type for value in graph.value_info]
    assert FLOAT64 not in [tensor.data_type for tensor in graph.initializer]
    # Weights are stored once; not those that are all zeros, ones or a mask.
    weights = [tensor.raw_data for tensor in graph.initializer if len(set(tensor.raw_data[1024:4096])) > 9]
    assert len(set(weights)) == len(weights) > 0


@pytest.mark.parametrize("suffix", ["pt2", slow("onnx")])
def test_a_program_computes_the_students_embedding(student: Path, tmp_path: Path, suffix: str) -> None:
    path, loaded = tmp_path / f"student.{suffix}", load_student(student)
    export(student, path, *(["--pooling", "mean", "--representation", "output"] if suffix == "onnx" else []))
    program, about = load(path)
    is_sound = loaded.encoder.input_name == "waveforms"
    assert about["embedding"] == ("output_mean" if suffix == "onnx" else "embedding")
    preprocessing = json.loads(about["preprocessing"])
    assert preprocessing == {"sample_rate": 16_000} if is_sound else preprocessing["image_size"] == 32
    batches = batches_for(loaded)
    for batch in batches:
        expected = loaded.embed_all(batch)[about["embedding"]]
        assert expected.std() > 1e-3
        torch.testing.assert_close(program(batch), expected, rtol=0, atol=1e-5)
    if suffix == "onnx":
        check_graph(path, {0, 1} if is_sound else {0})
    else:  # nothing in it is bound to the CPU
        assert program.to("meta")(batches[0].to("meta")).shape == (len(batches[0]), loaded.embed_dim)


def test_onnx_by_default(small: Path) -> None:
    student, path = load_student(small / "student.safetensors"), small / "student.onnx"
    check_graph(path, {0})
    [batch, _] = batches_for(student)
    torch.testing.assert_close(load(path)[0](batch), student.embed(batch), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SMALL_VITS, "narrow", *CONVOLUTIONS, "swin_tiny_patch4_window7_224"])
def test_students_of_timm_teachers_and_timm_students(name: str, tmp_path: Path) -> None:
    """Relative biases, rotary positions, registers, a narrow student, windows."""
    torch.manual_seed(0)
    if name in SMALL_VITS or name == "narrow":
        kind, sizes = name.replace("narrow", "small_dinov3"), {"embed_dim": 16} if name == "narrow" else {}
        model = random_vit(kind)
        teacher: Any = TimmTeacher(model, teacher_config(f"timm/{kind}", model, 1))
        student = teacher.build_student(depth=1, **sizes)
    else:
        student = load_teacher(GOLDEN / "tiny_base.pt").build_student(model=f"timm/{name}")
    path, program = tmp_path / "student.safetensors", tmp_path / "student.onnx"
    save_student(student, path)
    export(path, program)
    check_graph(program, {0})
    loaded = load_student(path)
    for batch in batches_for(loaded):
        torch.testing.assert_close(load(program)[0](batch), loaded.embed(batch), rtol=0, atol=1e-4)


@pytest.mark.parametrize("suffix", ["pt2", slow("onnx")])
def test_a_program_takes_pixels(narrow: Path, tmp_path: Path, suffix: str) -> None:
    """As any decoder gives them; the other program needs them normalized by hand."""
    path, student = tmp_path / f"student.{suffix}", load_student(narrow)
    export(narrow, path, "--preprocessing", "in")
    pixels = random_images(5)
    config: Any = student.encoder.config
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (config.image_mean, config.image_std))
    expected = student.embed((pixels / 255 - mean) / std)
    program, about = load(path)
    for count in (5, 1):
        embeddings = program(pixels[:count].permute(0, 2, 3, 1).contiguous())
        torch.testing.assert_close(embeddings, expected[:count], rtol=0, atol=1e-5)
    preprocessing = json.loads(about["preprocessing"])
    assert preprocessing["inputs"] == "uint8, (B, H, W, channels)"
    assert "image_mean" not in preprocessing  # nobody shall subtract it again


def test_a_program_that_computes_something_else_is_not_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the exporter had written another student's."""
    monkeypatch.setattr(programs, "write_onnx", lambda _, path, about: shutil.copy(small / "student.onnx", path))
    student, path = random_student(tmp_path / "other.safetensors", seed=1), tmp_path / "student.onnx"
    with pytest.raises(InputError, match=f"{path}: the exported model's embeddings differ from the student's"):
        export(student, path)
    assert [*tmp_path.iterdir()] == [student]


def test_onnx_is_one_file(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of any size is one file, or refused if it is too large for one."""
    assert {path.name for path in small.iterdir()} == {"student.onnx", "student.safetensors"}
    monkeypatch.setattr("d2v_composer.export.programs.MAX_ONNX", 1000)
    with pytest.raises(
        InputError, match=r"large.onnx: an ONNX file holds at most 2 GB, but this student's weights take 0.0"
    ):
        export(small / "student.safetensors", tmp_path / "large.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("preprocessing", ["out", "in"])
def test_int8_quantizes_every_linear_layer(
    exported: Path, tmp_path: Path, preprocessing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "student.onnx"
    raw = "--pooling", "cls", "--representation", "layer_mean"  # the embedding's mean hides int8's rounding
    export(exported, path, "--int8", "--calibrate", PHOTOS, "--preprocessing", preprocessing, *raw)
    found = re.findall(r"of 128 other images: smallest ([\d.]+), mean ([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    [(smallest, mean)] = found
    assert 0.98 < float(smallest) < float(mean) < 1
    assert load(path)[1]["embedding"] == "layer_mean_cls"
    student, layers = load_student(exported), [node.op_type for node in onnx.load(path).graph.node]
    num_blocks = len(student.block_list) + len(student.encoder.block_list)
    assert layers.count("MatMul") == 6 * num_blocks + 1  # qkv, proj, fc1, fc2, attention's two products; patches
    assert layers.count("QuantizeLinear") == 4 * num_blocks + 1


@pytest.mark.slow
def test_int8_is_calibrated_with_images_of_the_run(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, student = tmp_path / "student.safetensors", load_student(small / "student.safetensors")
    datasets = {"mine": {"format": "mds", "root": str(PHOTOS.parent)}}
    student.provenance |= {"config": {"retrieval": {"datasets": datasets}}}
    save_student(student, file)
    export(file, tmp_path / "int8.onnx", "--int8")
    assert " of 128 other images: " in capsys.readouterr().out


@pytest.mark.slow
def test_int8_that_computes_something_else_is_not_written(small: Path, tmp_path: Path) -> None:
    """The ranges found on black images, every second of these, do not fit the others."""
    black = saved(Image.new("RGB", (32, 32)))
    files = {f"{i:02}.jpg": black if i % 2 else encoded_image(i) for i in range(64)}
    out, photos = tmp_path / "out" / "int8.onnx", write_files(tmp_path / "photos", files)
    with pytest.raises(RunError, match=rf"{out}: cosine .*: smallest .*, expected at least 0\.98, so the file was not"):
        export(small / "student.safetensors", out, "--int8", "--calibrate", photos)
    assert not [*out.parent.iterdir()]


def test_int8_needs_images(exported: Path, tmp_path: Path) -> None:
    too_few = r"expected at least 20 images, got 0; choose a larger source with --calibrate$"
    with pytest.raises(InputError, match=too_few):
        export(exported, tmp_path / "student.onnx", "--int8")
    with pytest.raises(InputError, match=r"a\.pt2: --int8 is only for .onnx$"):
        export(exported, tmp_path / "a.pt2", "--int8")
    with pytest.raises(InputError, match=r"^--calibrate can be used only with --int8$"):
        export(exported, tmp_path / "a.onnx", "--calibrate", "photos")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--int8"], ["--preprocessing", "in"]])
def test_options_that_are_for_images(tmp_path: Path, options: list[str]) -> None:
    """A program of waveforms normalizes them itself."""
    student = load_teacher(GOLDEN / "audio_base.pt").build_student(depth=1)
    save_student(student, tmp_path / "student.safetensors")
    with pytest.raises(InputError, match=f"{' '.join(options)}: only for images; this model takes waveforms$"):
        export(tmp_path / "student.safetensors", tmp_path / "student.onnx", *options)
    assert [path.name for path in tmp_path.iterdir()] == ["student.safetensors"]
