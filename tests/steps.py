"""Small images, steps of training on them, and what a step costs."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:  # it needs Composer, which some tests run without
    from d2v_composer.objectives.distillation import Distillation


def random_images(count: int = 4, size: int = 32, seed: int = 1) -> Tensor:
    """Return the same uint8 images in each call, (B, 3, S, S)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def total_loss(model: "Distillation", inputs: Any) -> Tensor:
    loss = model.loss(model(inputs), inputs)
    return loss["total"] if isinstance(loss, dict) else loss


def train(model: "Distillation", inputs: Any, steps: int = 8, lr: float = 1e-2) -> list[float]:
    """Train what is to be trained, all of which must get a gradient; return the loss of each step."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=lr), []
    for _ in range(steps):
        loss = total_loss(model, inputs)
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def flops_of_a_step(model: "Distillation", inputs: Any) -> int:
    """Count the operations of a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        total_loss(model, inputs).backward()
    return counter.get_total_flops()
