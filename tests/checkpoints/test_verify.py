"""d2v verify finds what is wrong with an exported file, and a kit finds the same without this package."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from d2v_composer import load_teacher
from d2v_composer.checkpoints.check_program import Kit, check, load_onnxruntime, read_kit
from d2v_composer.checkpoints.load import save_student
from d2v_composer.commands import export, verify
from d2v_composer.system.errors import InputError
from helpers import ROOT

TEACHER, PHOTOS = ROOT / "yamls/quickstart/teacher.safetensors", ROOT / "yamls/quickstart/cifar10/test"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks with random weights, and beside them the same in ONNX."""
    path = tmp_path_factory.mktemp("student") / "student.safetensors"
    torch.manual_seed(0)
    save_student(load_teacher(TEACHER).build_student(depth=2), path)
    export.main([str(path), str(path.with_suffix(".onnx"))])
    return path


@pytest.fixture(scope="module")
def kit(student: Path) -> Kit:
    """What ``--kit`` writes of it."""
    folder = student.with_name("kit")
    verify.main([str(student.with_suffix(".onnx")), "--kit", str(folder)])
    return read_kit(folder)


def faults(kit: Kit, change: Callable[[onnx.ModelProto], None], path: Path) -> list[str]:
    """Return the faults of a changed copy of the kit's file."""
    model = onnx.load(kit.file)
    change(model)
    onnx.save(model, path)
    return check(load_onnxruntime(str(path)), kit, is_float32=True)["faults"]


def test_a_sound_file_has_no_faults(kit: Kit) -> None:
    found = check(load_onnxruntime(kit.file), kit, is_float32=True)
    assert found["faults"] == []
    assert found["cosine"] > 0.99999
    assert found["agreement"] > 0.99
    assert found["difference"] < 1e-5


def test_another_epsilon_is_found(kit: Kit, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
        assert norms
        for attribute in norms[-1].attribute:
            if attribute.name == "epsilon":
                attribute.f = 1e-2

    (fault,) = faults(kit, change, tmp_path / "epsilon.onnx")
    assert fault.startswith("difference ")
    assert fault.endswith("expected at most 1e-04")


def test_what_depends_on_the_batch_is_found(kit: Kit, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        own, graph = "embedding_of_one", model.graph
        for node in graph.node:
            node.output[:] = [own if name == "embedding" else name for name in node.output]
        graph.initializer.extend(
            [
                numpy_helper.from_array(np.array([0]), "batch_axis"),
                numpy_helper.from_array(np.array(0.5, np.float32), "share"),
            ]
        )
        graph.node.extend(
            [
                helper.make_node("ReduceMean", [own, "batch_axis"], ["mean"], keepdims=1),
                helper.make_node("Mul", ["mean", "share"], ["part"]),
                helper.make_node("Sub", [own, "part"], ["embedding"]),
            ]
        )

    assert "other embeddings of 1 inputs in a batch of 64" in faults(
        kit._replace(difference=None), change, tmp_path / "batch.onnx"
    )


def test_another_student_is_found(student: Path, kit: Kit, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    torch.manual_seed(1)
    save_student(load_teacher(TEACHER).build_student(depth=2), other)
    verify.main([str(student.with_suffix(".onnx")), "--student", str(other), "--kit", str(tmp_path / "kit")])
    found = check(load_onnxruntime(kit.file), read_kit(tmp_path / "kit"))
    assert found["faults"][0].startswith("cosine ")


def test_a_bad_scale_in_int8_is_found(student: Path, tmp_path: Path) -> None:
    file = tmp_path / "int8.onnx"
    export.main([str(student), str(file), "--int8", "--calibrate", str(PHOTOS)])
    verify.main([str(file), "--student", str(student), "--kit", str(tmp_path / "kit")])
    kit = read_kit(tmp_path / "kit")
    assert (kit.cosine, kit.difference) == (0.98, None)
    assert check(load_onnxruntime(kit.file), kit)["faults"] == []

    def change(model: onnx.ModelProto) -> None:
        scales = [each for each in model.graph.initializer if each.name.endswith("_scale") and len(each.dims)]
        scales[-1].CopyFrom(numpy_helper.from_array(8 * numpy_helper.to_array(scales[-1]), scales[-1].name))

    (fault,) = faults(kit, change, tmp_path / "bad.onnx")
    assert fault.startswith("cosine ")


def test_numbers_that_say_nothing_are_found(kit: Kit) -> None:
    of_one = {len(inputs): outputs for inputs, outputs in kit.batches}
    assert "numbers that are not finite" in check(lambda x: of_one[len(x)] * np.nan, kit)["faults"]
    same = check(lambda x: np.repeat(of_one[1], len(x), axis=0), kit._replace(cosine=-1.0))
    assert same["faults"] == ["the same embedding for every input"]


def test_bad_input_is_one_line(student: Path, tmp_path: Path) -> None:
    program = student.with_suffix(".onnx")
    for arguments, problem in (
        ([student], "must end in .onnx or .pt2"),
        ([program, "--runtime", "torch.export"], "torch.export is not installed, or takes no .onnx file"),
        ([program, "--student", tmp_path / "none.safetensors"], "none.safetensors: no such file; name the student"),
        ([program, "--kit", tmp_path], "is a folder"),
    ):
        with pytest.raises(InputError, match=problem):
            verify.main(list(map(str, arguments)))


@pytest.mark.slow
def test_the_command_and_the_kits_script(student: Path, kit: Kit, tmp_path: Path) -> None:
    program = student.with_suffix(".onnx")
    d2v = [sys.executable, "-m", "d2v_composer.commands", "verify", str(program)]
    said = subprocess.run(d2v, capture_output=True, text=True, check=True).stdout
    rows = {line.split()[0]: line for line in said.splitlines()}
    assert rows["onnxruntime"].endswith("ok")
    assert rows["PyTorch"].endswith("ok")
    found = json.loads(program.with_name("student.onnx.json").read_bytes())["runtimes"]
    assert found["PyTorch"]["difference"] == 0
    assert len(found["onnxruntime"]["rates"]) == 2

    folder = Path(kit.file).parent
    code = "import runpy, sys; sys.modules.update(d2v_composer=None, torch=None); "
    code += "sys.argv = ['check_program.py', '--runtime', 'onnxruntime']; "
    code += "runpy.run_path('check_program.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("onnxruntime ")] == ["ok"]

    other = tmp_path / "other.safetensors"
    torch.manual_seed(1)
    save_student(load_teacher(TEACHER).build_student(depth=2), other)
    done = subprocess.run([*d2v, "--student", str(other)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "onnxruntime: cosine" in done.stderr
