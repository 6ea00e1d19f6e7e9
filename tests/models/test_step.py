"""Memory and synchronization of a training step."""

import copy
from collections.abc import Iterator
from unittest.mock import Mock, patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.utils import clip_grad_norm_

from d2v_composer.models.configs import ImageEncoderConfig, TeacherConfig
from d2v_composer.models.data2vec2 import Data2Vec2
from d2v_composer.models.images import PixelEncoder
from d2v_composer.objectives.distillation import DistillationModel
from helpers import peak_allocated

MIB = 2**20


def build_model(embed_dim: int = 96, depth: int = 3) -> DistillationModel:
    """Small, with as many time steps as the paper's."""
    torch.manual_seed(0)
    encoder = ImageEncoderConfig(embed_dim=embed_dim, num_heads=4, prenet_depth=2, num_extra_tokens=1)
    teacher = Data2Vec2(TeacherConfig(encoder=encoder, depth=depth, average_top_k_layers=depth))
    return DistillationModel(teacher, teacher.build_student(depth=depth))


@pytest.fixture(scope="module")
def model() -> DistillationModel:
    return build_model()


@pytest.fixture(autouse=True)
def without_gradients(model: DistillationModel) -> Iterator[None]:
    yield
    model.zero_grad(set_to_none=True)


def random_images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def backward(model: DistillationModel, images: Tensor, num_images: int | None = None) -> Tensor:
    """Return the loss of images, as part of a batch of ``num_images``."""
    loss = model.loss(model(images), images) * (len(images) / (num_images or len(images)))
    loss.backward()
    return loss.detach()


def gradient(model: DistillationModel) -> Tensor:
    """Return all gradients in one vector; some are zero up to rounding, before an InstanceNorm."""
    return torch.cat([tensor.grad.flatten() for tensor in model.parameters() if tensor.grad is not None])


def assert_same_gradient(ours: DistillationModel, expected: DistillationModel) -> None:
    difference = gradient(ours) - gradient(expected)
    assert difference.norm() <= 1e-5 * gradient(expected).norm()


def test_checkpointed_activations_save_memory(model: DistillationModel) -> None:
    """The gradients are the same."""
    checkpointed, images = copy.deepcopy(model), random_images(8)
    checkpointed.student.checkpoint_activations()
    peaks = {module: peak_allocated(lambda module=module: backward(module, images)) for module in (model, checkpointed)}
    assert peaks[checkpointed] < 0.7 * peaks[model]
    assert_same_gradient(checkpointed, model)


def test_checkpointed_activations_are_of_a_compiled_forward() -> None:
    student = build_model().student
    block = student.block_list[0]
    block.forward = Mock(wraps=block.forward)
    student.checkpoint_activations()
    student.checkpoint_activations()
    x_BTD = torch.randn(2, student.encoder.config.num_tokens, student.embed_dim)
    student.forward_blocks(x_BTD)[0].sum().backward()
    assert block.forward.args[0].call_count == 2


def test_memory_grows_linearly_with_the_batch(model: DistillationModel) -> None:
    backward(model, random_images(1))  # the gradients, and ALiBi's bias, are there from now on
    images = random_images(16)
    peaks = [peak_allocated(lambda n=n: backward(model, images[:n])) for n in (4, 8, 16)]
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
            loss = model.loss(model(images), images)
        loss.backward()
        clip_grad_norm_(trained, 2.0)
        optimizer.step()
        with pytest.raises(DataDependentOutputException):
            loss.item()
