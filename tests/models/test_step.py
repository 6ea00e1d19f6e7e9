"""Costs of a step: memory, synchronization, graphs; bfloat16 and torch.compile give nearly the same numbers.

tests/promises/test_run_ranks.py counts the graphs of a compiled run, and compares its losses and accuracies.
"""

import copy
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.utils import clip_grad_norm_

from d2v_composer.checkpoints.load import load_teacher
from d2v_composer.models.configs import ImageEncoderConfig, TeacherConfig
from d2v_composer.models.data2vec2 import Data2Vec2
from d2v_composer.models.encoder import Inputs, Tokens
from d2v_composer.models.images import PixelEncoder
from d2v_composer.objectives.compilation import captured, compile_model
from d2v_composer.objectives.distillation import DistillationModel
from d2v_composer.sources.labeled import load_labeled_set
from helpers import GOLDEN, QUICKSTART, peak_allocated
from steps import random_images, total_loss, train

MIB = 2**20


def build_model() -> DistillationModel:
    """Small, with as many time steps as the paper's."""
    torch.manual_seed(0)
    encoder = ImageEncoderConfig(embed_dim=96, num_heads=4, prenet_depth=2, num_extra_tokens=1)
    teacher = Data2Vec2(TeacherConfig(encoder=encoder, depth=3, average_top_k_layers=3))
    return DistillationModel(teacher, teacher.build_student(depth=3))


def backward(model: DistillationModel, count: int) -> None:
    """Compute the gradients for a batch."""
    total_loss(model, random_images(count, 224)).backward()


def gradient(model: DistillationModel) -> Tensor:
    """Return all gradients in one vector; some are zero up to rounding, before an InstanceNorm."""
    return torch.cat([tensor.grad.flatten() for tensor in model.parameters() if tensor.grad is not None])


def test_checkpointed_activations_save_memory() -> None:
    """The gradients are the same."""
    model, checkpointed = build_model(), build_model()
    checkpointed.student.checkpoint_activations()
    peaks = {module: peak_allocated(lambda module=module: backward(module, 8)) for module in (model, checkpointed)}
    assert peaks[checkpointed] < 0.7 * peaks[model]
    expected = gradient(model)
    assert (gradient(checkpointed) - expected).norm() <= 1e-5 * expected.norm()


def test_checkpointed_activations_are_of_a_compiled_forward() -> None:
    student = build_model().student
    block = student.block_list[0]
    block.forward = Mock(wraps=block.forward)
    student.checkpoint_activations()
    student.checkpoint_activations()
    x_BTD = torch.randn(2, student.encoder.config.num_tokens, student.embed_dim)
    student.forward_blocks(x_BTD)[0].sum().backward()
    assert block.forward.args[0].call_count == 2


def test_memory_grows_linearly_with_the_batch() -> None:
    model = build_model()
    backward(model, 1)  # the gradients, and ALiBi's bias, are there from now on
    peaks = [peak_allocated(lambda count=count: backward(model, count)) for count in (4, 8, 16)]
    first, second = peaks[1] - peaks[0], (peaks[2] - peaks[1]) / 2
    assert first > MIB
    assert second == pytest.approx(first, rel=0.02)


def test_a_step_does_not_synchronize_with_the_device() -> None:
    """Run a step on tensors without values; reading one, as ``.item()`` or a boolean index do, is an error."""
    with FakeTensorMode(), patch.object(PixelEncoder, "is_first", False):
        model = build_model()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
        images = torch.zeros(4, 3, 224, 224, dtype=torch.uint8)
        with torch.autocast("cpu", torch.bfloat16):
            loss = total_loss(model, images)
        loss.backward()
        clip_grad_norm_(trained, 2.0)
        optimizer.step()
        with pytest.raises(DataDependentOutputException):
            loss.item()


# bfloat16 and torch.compile.


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Real images: (16, 3, 32, 32) uint8."""
    labeled = load_labeled_set("mds", QUICKSTART / "cifar10", image_size=32, interpolation="bicubic")
    return labeled.train.samples[:16]


@pytest.fixture(scope="module")
def model() -> DistillationModel:
    """The quickstart's teacher and student; tests must not train it."""
    torch.manual_seed(0)
    teacher = load_teacher(QUICKSTART / "teacher.safetensors")
    return DistillationModel(teacher, teacher.build_student(depth=3))


def test_losses_in_bfloat16_are_close(model: DistillationModel, images: Tensor) -> None:
    few, in_bf16 = images[:4], copy.deepcopy(model)  # a CPU without the instructions takes a second for each step
    in_bf16.teacher.cast_weights(torch.bfloat16)
    in_bf16.cpu_bf16 = True
    expected = train(copy.deepcopy(model), few, lr=2e-3)
    np.testing.assert_allclose(train(in_bf16, few, lr=2e-3), expected, rtol=0.01)


def compile_for_a_gpu(model: DistillationModel, choice: bool | str, results: Any = None) -> list[dict[str, Any]]:
    """Compile a model as on a GPU, into functions that return ``results``; return the options of each CUDA graph."""
    asked: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        patched.setattr(torch, "compile", lambda _, **options: asked.append(options) or (lambda *_: results))
        compile_model(model, choice)
    return [options for options in asked if options.get("options") == {"triton.cudagraphs": True}]


@pytest.mark.parametrize(("choice", "num_graphs"), [(True, 1), ("default", 0)])
def test_a_gpu_starts_the_frozen_pass_as_one_graph_unless_a_mode_is_chosen(
    choice: bool | str, num_graphs: int, model: DistillationModel
) -> None:
    assert len(compile_for_a_gpu(copy.deepcopy(model), choice)) == num_graphs


def test_the_results_of_a_graph_are_copies(model: DistillationModel) -> None:
    """The next replay overwrites the graph's own."""
    x_BTD, target, compiled = torch.zeros(1), torch.ones(1), copy.deepcopy(model)
    compile_for_a_gpu(compiled, True, results=(Tokens(x_BTD), {"tokens": target}))
    tokens, targets = compiled.frozen_pass(Inputs(torch.empty(0)))
    assert tokens is not None
    for result, buffer in ((tokens.x, x_BTD), (targets["tokens"], target)):
        assert torch.equal(result, buffer)
        assert result.data_ptr() != buffer.data_ptr()


@pytest.mark.slow
def test_a_pass_that_cannot_be_a_cuda_graph_computes_the_same(model: DistillationModel, images: Tensor) -> None:
    run = captured(model.frozen_pass)
    with torch.no_grad():
        for batch in (images[:8], images[8:], images[:5]):
            (tokens, targets), (expected, wanted) = run(Inputs(batch)), model.frozen_pass(Inputs(batch))
            assert tokens is not None
            assert expected is not None
            torch.testing.assert_close(tokens.x, expected.x, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(targets, wanted, rtol=1e-4, atol=1e-4)


LENGTHS = torch.tensor([9000, 6137, 12_000])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpoint", "options", "batch"),
    [
        ("audio_base", {"depth": 1}, {"audio": 0.1 * torch.randn(3, 12_000), "lengths": LENGTHS}),
        ("tiny_base", {"model": "timm/resnet10t"}, random_images()),
    ],
)
def test_a_compiled_step_of_padded_clips_or_a_network_is_close(checkpoint: str, options: Any, batch: Any) -> None:
    torch.manual_seed(0)
    teacher: Any = load_teacher(GOLDEN / f"{checkpoint}.pt")
    model = DistillationModel(teacher, teacher.build_student(**options))
    expected = total_loss(model, batch)
    torch._dynamo.reset()
    compile_model(model)
    torch.testing.assert_close(total_loss(model, batch), expected, rtol=1e-4, atol=1e-4)
