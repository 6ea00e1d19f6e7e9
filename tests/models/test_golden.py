"""The reference implementation's numbers: fairseq's data2vec 2.0, float32, on a CPU."""

import numpy as np
import pytest
import torch
from torch import Tensor

from d2v_composer.checkpoints.load import load_teacher
from d2v_composer.models.data2vec2 import Data2Vec2
from d2v_composer.models.distillation import DistillationModel
from d2v_composer.models.student import Student
from d2v_composer.models.targets import norm_mean
from helpers import GOLDEN

TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-5

Golden = tuple[Data2Vec2, Student, dict[str, Tensor]]


@pytest.fixture(scope="module", params=["tiny_base", "tiny_alibi", "tiny_topk_noprenet"])
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


def assert_close(ours: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(ours, reference, rtol=0, atol=TOLERANCE)


def test_teacher(golden: Golden) -> None:
    teacher, _, arrays = golden
    x = teacher.encode(arrays["images"])
    assert_close(x, arrays["encoder_out"])
    output, ffn_outputs = teacher.forward_blocks(x)
    assert_close(output, arrays["teacher_out"])
    assert len(ffn_outputs) == teacher.config.depth
    for i, ffn_output in enumerate(ffn_outputs):
        assert_close(ffn_output, arrays[f"teacher_ffn_{i}"])


def test_targets_with_and_without_extra_tokens(golden: Golden) -> None:
    teacher, _, arrays = golden
    x = teacher.encode(arrays["images"])
    assert_close(teacher.targets(x), arrays["targets"])
    assert_close(teacher.targets(x, extra_tokens="drop"), arrays["targets_patch_only"])


def test_student(golden: Golden) -> None:
    teacher, student, arrays = golden
    assert student.alibi is not None
    x = teacher.encode(arrays["images"])
    assert_close(student.alibi(x.shape[1], x.dtype, x.device)[0], arrays["student_alibi"])
    output, ffn_outputs = student.forward_blocks(x)
    assert_close(output, arrays["student_out"])
    for i, ffn_output in enumerate(ffn_outputs):
        assert_close(ffn_output, arrays[f"student_ffn_{i}"])
    assert_close(norm_mean(ffn_outputs), arrays["student_prediction"])


def test_loss_and_gradients(golden: Golden) -> None:
    teacher, student, arrays = golden
    model = DistillationModel(teacher, student, prediction="layer_mean")
    student.zero_grad()
    loss = model.loss(model(arrays["images"]), arrays["images"])
    assert_close(loss, arrays["loss"].reshape(()))
    loss.backward()
    for block, layer, name in ((0, "attn.qkv", "grad_first_qkv"), (-1, "mlp.fc2", "grad_last_fc2")):
        gradient = student.block_list[block].get_parameter(f"{layer}.weight").grad
        assert gradient is not None
        assert (gradient - arrays[name]).norm() <= GRADIENT_TOLERANCE * arrays[name].norm()


def test_loss_of_the_last_block(golden: Golden) -> None:
    teacher, student, arrays = golden
    model = DistillationModel(teacher, student, prediction="last_block")
    assert_close(model.loss(model(arrays["images"]), arrays["images"]), arrays["loss_last_block"].reshape(()))
