"""recipes/minimal.py, the method on one page, computes what the package and the reference implementation compute."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from d2v_composer import DistillationModel, load_teacher
from helpers import GOLDEN, ROOT, assert_same_numbers, succeed
from recipes import minimal

QUICKSTART = ROOT / "yamls" / "quickstart" / "teacher.safetensors"


def assert_equal(ours: Tensor | None, expected: Tensor | None) -> None:
    """Compare up to 1e-6 of the largest value: the order of sums differs."""
    assert ours is not None
    assert expected is not None
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def gradient(student: nn.Module, names: list[str]) -> Tensor:
    gradients = [student.get_parameter(name).grad for name in names]
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def test_it_computes_what_the_package_computes() -> None:
    """Promise 1: target, prediction, loss and every gradient, for the same images and weights."""
    theirs = load_teacher(QUICKSTART)
    torch.manual_seed(0)
    images = torch.randn(8, 3, 32, 32)
    teacher = minimal.Teacher(QUICKSTART)
    student = minimal.Student(teacher.sizes)
    model = DistillationModel(theirs, theirs.build_student(depth=minimal.DEPTH, mlp_ratio=minimal.MLP_RATIO))
    model.student.load_state_dict(student.state_dict(), strict=False)
    target, prediction, loss = minimal.step(teacher, student, images)
    loss.backward()
    outputs = model(images)
    model.loss(outputs, images).backward()
    assert_equal(target, outputs["tokens"].target)
    assert_equal(prediction, outputs["tokens"].prediction)
    assert_equal(loss, model.loss(outputs, images))
    trained = [name for name, weight in model.student.named_parameters() if weight.requires_grad]
    assert len(trained) > 12 * (minimal.DEPTH - 1)
    assert_equal(gradient(student, trained), gradient(model.student, trained))


def test_it_has_the_references_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 1: fairseq's data2vec 2.0, within 3e-5 of an array's largest value."""
    arrays = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / "tiny_base.npz").items()}
    weights = {name.removeprefix("student."): array for name, array in arrays.items() if name.startswith("student.")}
    succeed("convert-teacher", GOLDEN / "tiny_base.pt", tmp_path / "teacher.safetensors")
    teacher = minimal.Teacher(tmp_path / "teacher.safetensors")
    depth, hidden = len({name.split(".")[1] for name in weights}), len(weights["blocks.0.mlp.fc1.bias"])
    monkeypatch.setattr(minimal, "DEPTH", depth)
    monkeypatch.setattr(minimal, "MLP_RATIO", hidden / teacher.sizes["embed_dim"])
    student = minimal.Student(teacher.sizes)
    student.load_state_dict(weights)
    assert_same_numbers(student.bias_HTT, arrays["student_alibi"])
    assert_same_numbers(teacher.encoder(arrays["images"]), arrays["encoder_out"])
    target, prediction, loss = minimal.step(teacher, student, arrays["images"])
    loss.backward()
    assert_same_numbers(target, arrays["targets"])
    assert_same_numbers(prediction, arrays["student_prediction"])
    assert_same_numbers(loss, arrays["loss"].reshape(()))
    for name, gradient in {"0.attn.qkv": "grad_first_qkv", f"{depth - 1}.mlp.fc2": "grad_last_fc2"}.items():
        assert_same_numbers(student.get_parameter(f"blocks.{name}.weight").grad, arrays[gradient])


def test_it_imports_neither_the_package_nor_composer_and_is_a_page() -> None:
    text = Path(minimal.__file__).read_text()
    assert not re.search(r"^\s*(from|import) (d2v_composer|composer)", text, re.MULTILINE)
    assert len(text.splitlines()) <= 200


@pytest.mark.slow
def test_it_trains_and_prints_what_it_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A few steps: the loss falls, and the teacher is better than the untrained student."""
    monkeypatch.setattr(minimal, "STEPS", 51)
    monkeypatch.setattr(minimal, "WARMUP", 10)
    minimal.main()
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert losses[-1] < 0.5 * losses[0]
    top1 = {name: float(value) for name, value in re.findall(r"^([\w ]+): bank train top-1 ([\d.]+) %", printed, re.M)}
    assert top1["untrained student"] < top1["student"] < top1["teacher"]
