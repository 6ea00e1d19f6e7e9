"""d2v verify finds what is wrong with an exported file, and a kit finds the same without this package."""

import hashlib
import json
import re
import resource
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.load import save_student
from d2v_composer.commands import export, verify
from d2v_composer.export import programs as exported
from d2v_composer.export import verification
from d2v_composer.export.programs import quantize
from d2v_composer.models.timm_teacher import TimmTeacher, teacher_config
from d2v_composer.system.errors import InputError, RunError
from helpers import GOLDEN, ROOT, d2v, failure, succeed
from small_students import random_student, student_with_program
from small_vits import RESAMPLED_BILINEARLY, random_vit

SMALL_VITS = [*RESAMPLED_BILINEARLY, "small_beit", "small_mixed_rope", "small_dinov3", "small_dinov3_without_bias"]
CONVOLUTIONS = ["resnet10t", "convnext_atto", "mobilenetv4_conv_small_035", "test_efficientnet", "repvit_m0_9"]
PHOTOS = ROOT / "yamls/quickstart/cifar10/test"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, and beside it the same in ONNX; read-only."""
    return student_with_program(tmp_path_factory) / "student.safetensors"


def write_kit(program: Path, student: Path, folder: Path, *limits: str) -> Path:
    verify.main([str(program), "--student", str(student), "--kit", str(folder), *limits])
    return folder


@pytest.fixture(scope="module")
def kit(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_kit(student.with_suffix(".onnx"), student, tmp_path_factory.mktemp("verified") / "kit")


def run_kit(kit: Path, program: Path) -> Any:
    """Return what the kit's script ends with: None, or what is wrong."""
    arguments = ["check_program.py", "onnxruntime", str(program)]
    with patch.object(sys, "argv", arguments), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(kit / "check_program.py"), run_name="__main__")
    return ended.value.code


def changed(program: Path, change: Callable[[onnx.ModelProto], None], path: Path) -> Path:
    model = onnx.load(program)
    change(model)
    onnx.save(model, path)
    return path


def test_a_full_disk_is_named(student: Path, tmp_path: Path) -> None:
    """The disk of the temporary folder, too, which gets the same files."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"kit\.npz cannot be written: File too large$"):
            write_kit(student.with_suffix(".onnx"), student, tmp_path / "kit")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_kit_runs_without_this_package(kit: Path, student: Path) -> None:
    write_kit(kit / "student.onnx", student, kit)  # again, with the copy that lies there
    code = "import runpy, sys; sys.modules.update(d2v_composer=None, torch=None); "
    code += "sys.argv[1:] = ['onnxruntime', 'student.onnx']; runpy.run_path('check_program.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=kit, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["cosine"] > 0.99999
    assert measured["agreement"] > 0.99
    assert 0 < measured["difference"] < 1e-5
    assert min(measured["/s at 1"], measured["/s at 16"], measured["load s"], measured["peak MB"]) > 0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda computed: 1.001 * computed, "^difference 0.001, expected 0 to 0.0001$"),
        (lambda computed: computed - computed.mean(axis=0) / 2, "by batch "),
        (lambda computed: np.nan * computed, "cosine nan"),
        (np.ones_like, "agreement "),
    ],
    ids=["scaled", "minus half of the batch's mean", "NaN", "all alike"],
)
def test_a_fault_of_a_runtime_is_found_whatever_its_cosine(
    change: Callable[[np.ndarray], np.ndarray], problem: str, kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Any = onnxruntime.InferenceSession.run
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", lambda *inputs: [change(run(*inputs)[0])])
    tolerant = Path(shutil.copytree(kit, tmp_path / "kit"))
    limits = json.loads((kit / "kit.json").read_text()) | {"cosine": -1}
    (tolerant / "kit.json").write_text(json.dumps(limits))
    assert re.search(problem, run_kit(tolerant, kit / "student.onnx"))


def test_another_student_is_found(student: Path, tmp_path: Path) -> None:
    other = random_student(tmp_path / "other.safetensors", seed=1)
    kit = write_kit(student.with_suffix(".onnx"), other, tmp_path / "kit")
    assert run_kit(kit, kit / "student.onnx").startswith("cosine ")


def test_a_bad_scale_in_int8_is_found(student: Path, tmp_path: Path) -> None:
    program = tmp_path / "int8.onnx"
    images = verification.read_samples(load_student(student), str(PHOTOS), 64)
    quantize(student.with_suffix(".onnx"), program, images)
    kit = write_kit(program, student, tmp_path / "kit")
    assert run_kit(kit, program) is None

    def change(model: onnx.ModelProto) -> None:
        scales = [tensor for tensor in model.graph.initializer if tensor.name.endswith("_scale") and len(tensor.dims)]
        scales[-1].CopyFrom(numpy_helper.from_array(8 * numpy_helper.to_array(scales[-1]), scales[-1].name))

    wrong = run_kit(kit, changed(program, change, tmp_path / "bad.onnx"))
    assert wrong.startswith("cosine ")
    assert "expected 0.98 to " in wrong


def test_a_limit_of_0_is_no_default(student: Path, tmp_path: Path) -> None:
    program = student.with_suffix(".onnx")
    kit = write_kit(program, student, tmp_path / "kit", "--cosine", "0", "--difference", "0")
    limits = json.loads((kit / "kit.json").read_text())
    assert (limits["cosine"], limits["difference"]) == (0, 0)


def test_bad_input_is_one_line(student: Path, tmp_path: Path) -> None:
    program, text = student.with_suffix(".onnx"), tmp_path / "student.txt"
    (tmp_path / "mine").touch()
    for arguments, problem in (
        ([text, "--student", student], "must be an .onnx, .pt2 or .safetensors file that d2v export wrote from this s"),
        (
            [program, "--runtime", "torch.export"],
            "torch.export takes .pt2 files, got .*.onnx; to measure a converted file, use --kit",
        ),
        ([program, "--student", tmp_path / "none.safetensors"], "none.safetensors: no such file; name the student"),
        ([program, "--kit", tmp_path], "holds foreign files"),
    ):
        with pytest.raises(InputError, match=problem):
            verify.main(list(map(str, arguments)))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("suffix", ["onnx", "safetensors"])
def test_another_preprocessing_is_found(student: Path, tmp_path: Path, suffix: str) -> None:
    """The numbers would not show it: a runtime gets normalized images."""

    def change(model: onnx.ModelProto) -> None:
        [stored] = [entry for entry in model.metadata_props if entry.key == "preprocessing"]
        stored.value = stored.value.replace("0.406]", "0.5]", 1)

    other, program = load_student(student), tmp_path / f"other.{suffix}"
    other.encoder.config = other.encoder.config.changed(image_mean=(0.5, 0.5, 0.5))
    save_student(other, program) if suffix == "safetensors" else changed(student.with_suffix(".onnx"), change, program)
    with pytest.raises(
        InputError, match=rf"{program}: its preprocessing is .*0\.5\], .*, but the student's preprocessing is .*0\.406"
    ):
        verify.main([str(program), "--student", str(student)])


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


def test_a_program_is_one_that_every_runtime_takes(student: Path) -> None:
    check_graph(student.with_suffix(".onnx"), {0})


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SMALL_VITS, "narrow", *CONVOLUTIONS, "swin_tiny_patch4_window7_224"])
def test_students_of_timm_teachers_and_timm_students(name: str, tmp_path: Path) -> None:
    """Relative biases, rotary positions, registers, a narrow student, windows: the same embeddings, no fault."""
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
    export.main([str(path), str(program)])
    check_graph(program, {0})
    assert run_kit(write_kit(program, path, tmp_path / "kit"), program) is None


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--int8", "--calibrate", str(PHOTOS)]], ids=["float32", "int8"])
def test_programs_of_pixels(student: Path, tmp_path: Path, options: list[str]) -> None:
    """The kit's inputs are the pixels, and another order of their channels is found."""
    program = tmp_path / "student.onnx"
    export.main([str(student), str(program), "--preprocessing", "in", *options])
    kit = write_kit(program, student, tmp_path / "kit")
    assert run_kit(kit, program) is None
    pixels, expected = np.load(kit / "kit.npz").values()
    assert (pixels.dtype, pixels.shape) == (np.uint8, (64, 32, 32, 3))
    np.savez(kit / "kit.npz", pixels[..., ::-1], expected)
    assert run_kit(kit, program).startswith("cosine ")


@pytest.mark.slow
def test_int8_is_measured_with_other_images_of_the_run(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --calibrate; none of them calibrated, and what ships is not read."""
    file, seen, read = tmp_path / "student.safetensors", list[set[bytes]](), verification.read_samples
    loaded = load_student(student)
    datasets = {"mine": {"format": "mds", "root": str(PHOTOS.parent)}}
    loaded.provenance |= {"config": {"retrieval": {"datasets": datasets}}}
    save_student(loaded, file)

    def see(images: Any) -> Any:
        seen.append({image.numpy().tobytes() for image in images})
        return images

    monkeypatch.setattr(verification, "read_samples", lambda *arguments: see(read(*arguments)))
    monkeypatch.setattr(exported, "quantize", lambda program, out, images: quantize(program, out, see(images)))
    monkeypatch.setattr(verification, "SHIPPED", {"images": str(tmp_path / "none")})
    export.main([str(file), str(tmp_path / "int8.onnx"), "--int8"])
    _, calibrating, measured = seen
    assert (len(calibrating), len(measured)) == (128, 64)
    assert calibrating.isdisjoint(measured)


def test_a_line_names_the_fastest_runtime_beside_the_next_and_the_slowest() -> None:
    rates = {"pytorch": (10.0, 40.0), "onnxruntime": (30.0, 20.0), "openvino": (15.0, 50.0)}
    found = {name: {"/s at 1": at_1, "/s at 16": at_16} for name, (at_1, at_16) in rates.items()}
    assert verification.name_fastest(found) == (
        "fastest runtime that met all limits: in batches of 1, onnxruntime is 2.00 times as fast as openvino and 3.00 "
        "times as fast as pytorch; in batches of 16, openvino is 1.25 times as fast as pytorch and 2.50 times as fast "
        "as onnxruntime"
    )
    assert verification.name_fastest({"pytorch": found["pytorch"]}).endswith(": nothing to compare")


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "runtime"), [("onnx", "onnxruntime"), ("pt2", "torch.export")])
def test_the_command_measures_beside_pytorch(student: Path, tmp_path: Path, suffix: str, runtime: str) -> None:
    """After an export, with a section in the card; with another student, status 1 names the runtime and the number."""
    file, program, readme = (tmp_path / name for name in ("s.safetensors", f"s.{suffix}", "README.md"))
    succeed("export", student, file, "--verify")
    shown = succeed("export", file, program, "--verify").stdout
    assert {line.split()[0] for line in shown.splitlines()} >= {"pytorch", runtime}
    factor = r"\d+\.\d\d times as fast as \S+( and .*)?"
    assert re.search(
        rf"^fastest runtime that met all limits: in batches of 1, \S+ is {factor}; in batches of 16, \S+ is {factor}$",
        shown,
        re.MULTILINE,
    )
    report = json.loads((tmp_path / f"{program.name}.verify.json").read_text())
    assert report["faults"] == {}
    assert report["runtimes"]["pytorch"]["difference"] == 0
    assert report["versions"]["onnxruntime"]
    assert report["sha256"] == hashlib.sha256(program.read_bytes()).hexdigest()
    card = readme.read_text()
    assert f"sha256 {report['sha256']}" in card
    assert re.findall("^## (.*) in each runtime$", card, re.MULTILINE) == [file.name, program.name]
    other = random_student(tmp_path / "other.safetensors", seed=1)
    line = failure(d2v("verify", program, "--student", other, "--runtime", runtime), 1)
    assert line.startswith(f"error: {program}: {runtime}: cosine ")
    again = readme.read_text()
    assert again.count("in each runtime") == 2
    assert again != card


@pytest.mark.slow
def test_clips_of_two_lengths_are_verified(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student, program = tmp_path / "student.safetensors", tmp_path / "student.onnx"
    save_student(load_teacher(GOLDEN / "audio_base.pt", first_blocks=1).build_student(depth=1), student)
    export.main([str(student), str(program)])
    check_graph(program, {0, 1})
    runtimes = ["onnxruntime", *(["openvino-float32"] if find_spec("openvino") else [])]
    verify.main([str(program), *(word for name in runtimes for word in ("--runtime", name))])
    report = json.loads((tmp_path / "student.onnx.verify.json").read_text())
    assert report["faults"] == {}
    assert list(report["runtimes"]) == ["pytorch", *runtimes]
    clips, shorter, embeddings = np.load(write_kit(program, student, tmp_path / "kit") / "kit.npz").values()
    assert len(embeddings) == len(clips) + len(shorter)
    assert shorter.shape[1] < clips.shape[1]
