"""Promises 1 and 2: the reference implementation's numbers (fairseq's data2vec 2.0, float32), and one encoding.

Students are of images and of sound; tests/promises/test_audio_method.py has the teachers of sound.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from d2v_composer import DistillationModel, load_teacher
from helpers import GOLDEN, assert_same_numbers

Golden = tuple[Any, Any, dict[str, Tensor]]
IMAGES, SOUND = ("tiny_base", "tiny_alibi", "tiny_topk_noprenet"), ("audio_base", "audio_prenet")


@pytest.fixture(scope="module", params=[*IMAGES, *SOUND])
def golden(request: pytest.FixtureRequest) -> Golden:
    """A teacher, a student with the reference's weights, and the reference's arrays."""
    arrays = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / f"{request.param}.npz").items()}
    teacher = load_teacher(GOLDEN / f"{request.param}.pt")
    weights = {name.removeprefix("student."): array for name, array in arrays.items() if name.startswith("student.")}
    depth = len({name.split(".")[1] for name in weights})
    mlp_ratio = len(weights["blocks.0.mlp.fc1.bias"]) / teacher.config.embed_dim
    student = teacher.build_student(depth=depth, mlp_ratio=mlp_ratio)
    assert not student.load_state_dict(weights, strict=False).unexpected_keys
    return teacher, student, arrays


def model_of(golden: Golden, **options: Any) -> tuple[Any, Any]:
    """Return the distillation of a teacher into a student as the reference does it, and its batch."""
    teacher, student, arrays = golden
    if "images" in arrays:
        return DistillationModel(teacher, student, **options), arrays["images"]
    return DistillationModel(teacher, student, final_layer_norm=True, **options), {"audio": arrays["waveforms"]}


@pytest.mark.parametrize("golden", IMAGES, indirect=True)
def test_teacher(golden: Golden) -> None:
    """1."""
    teacher, _, arrays = golden
    x = teacher.encode(arrays["images"])
    assert_same_numbers(x, arrays["encoder_out"])
    output, ffn_outputs = teacher.forward_blocks(x)
    assert_same_numbers(output, arrays["teacher_out"])
    assert len(ffn_outputs) == teacher.config.depth
    for i, ffn_output in enumerate(ffn_outputs):
        assert_same_numbers(ffn_output, arrays[f"teacher_ffn_{i}"])


@pytest.mark.parametrize("golden", IMAGES, indirect=True)
def test_targets_with_and_without_extra_tokens(golden: Golden) -> None:
    """1."""
    teacher, _, arrays = golden
    x = teacher.encode(arrays["images"])
    assert_same_numbers(teacher.targets(x), arrays["targets"])
    assert_same_numbers(teacher.targets(x, extra_tokens="drop"), arrays["targets_patch_only"])


def test_student(golden: Golden) -> None:
    """1."""
    teacher, student, arrays = golden
    model, batch = model_of(golden)
    x = teacher.encode(arrays["waveforms" if "waveforms" in arrays else "images"])
    if "student_alibi" in arrays:
        assert_same_numbers(student.block_contexts(x)[0][0], arrays["student_alibi"])
    output, ffn_outputs = student.forward_blocks(x)
    assert_same_numbers(output, arrays["student_out"])
    for i, ffn_output in enumerate(ffn_outputs):
        assert_same_numbers(ffn_output, arrays[f"student_ffn_{i}"])
    assert_same_numbers(model(batch).prediction, arrays["student_prediction"])


def test_loss_and_gradients(golden: Golden) -> None:
    """1."""
    _, student, arrays = golden
    model, batch = model_of(golden, prediction="layer_mean")
    student.zero_grad()
    loss = model.loss(model(batch), batch)
    assert_same_numbers(loss, arrays["loss"].reshape(()))
    loss.backward()
    last = len(student.block_list) - 1
    for name, gradient in {"blocks.0.attn.qkv": "grad_first_qkv", f"blocks.{last}.mlp.fc2": "grad_last_fc2"}.items():
        assert_same_numbers(student.get_parameter(f"{name}.weight").grad, arrays[gradient])


def test_loss_of_the_last_block(golden: Golden) -> None:
    """1."""
    model, batch = model_of(golden, prediction="last_block")
    assert_same_numbers(model.loss(model(batch), batch), golden[2]["loss_last_block"].reshape(()))


@pytest.mark.parametrize("golden", IMAGES, indirect=True)
def test_only_the_students_blocks_are_trained_and_images_are_encoded_once(golden: Golden) -> None:
    """2: the paper's sizes and FLOPs, tests/models shows."""
    teacher, student, arrays = golden
    model, calls = DistillationModel(teacher, student), []
    hook = teacher.encoder.register_forward_hook(lambda *_: calls.append(1))
    model.loss(model(arrays["images"]), arrays["images"])
    hook.remove()
    assert calls == [1]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    blocks = {f"student.{name}" for name, _ in student.named_parameters() if name.startswith("blocks.")}
    assert trained <= blocks
    assert {name.split(".")[-2] for name in blocks - trained} == {"norm2"}  # the last one: it is after the targets
