"""Measure a training step: the naive program and ours, eager and compiled, interleaved in one process.

A step is what Composer's Trainer does with a loaded batch: forward, backward, clipping, AdamW. All contenders start
from the same weights and must find the same loss. The yardstick is a matrix product of the MLP's shape on the same
device, in images/s of a step that were made of such products alone.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import instance_norm, layer_norm, mse_loss
from torch.nn.utils import clip_grad_norm_

from d2v_composer.benchmarks.measure import describe, interleave
from d2v_composer.models.attention import Attention, Block, init_linear_layers
from d2v_composer.models.data2vec2 import Data2Vec2
from d2v_composer.models.distillation import DistillationModel
from d2v_composer.models.execution import PRECISIONS, compile_model, find_missing, name_precision
from d2v_composer.models.sizes import RELEASED, Data2Vec2Config, height_and_width
from d2v_composer.models.targets import NORM_EPS
from d2v_composer.system.errors import InputError

NAIVE, EAGER, OURS, PRODUCT = "naive", "ours, eager", "ours", "matrix product alone"
LOSS_TOLERANCE = 1e-3
PRODUCTS_PER_PASS = 10
CLIPPING_THRESHOLD = 2.0

# A teacher's sizes, and the student's depth.
SMALL = Data2Vec2Config(
    embed_dim=192, num_heads=6, depth=6, average_top_k_layers=6, num_extra_tokens=1, image_size=32, patch_size=4
)
SIZES = {**{name: (config, 5) for name, config in RELEASED.items()}, "quickstart": (SMALL, 3)}


def benchmark(
    size: str = "base",
    precision: str = "auto",
    batch_size: int | None = None,
    repeats: int = 5,
    compiles: bool = True,
) -> dict[str, Any]:
    """Measure images per second of each contender.

    Raises:
        InputError: There is no compiler.
        RuntimeError: The contenders find different losses.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if compiles and (missing := find_missing()) is not None:
        raise InputError(f"torch.compile {missing}; install it, or use --no-compile")
    precision = name_precision(precision, device == "cuda")
    steps = 10 if device == "cuda" else 1
    batch_size = batch_size or (256 if device == "cuda" else 8)
    torch.manual_seed(0)
    model, dtype = build_model(size).to(device), PRECISIONS[precision]
    shape = batch_size, 3, *height_and_width(model.teacher.config.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    flop = model.flops_per_batch(torch.empty(1, 0))
    naive = NaiveDistillation(model)
    contenders = {NAIVE: partial(train_step, naive, build_optimizer(naive, fused=False), dtype)}
    for name in (EAGER, OURS)[: 1 + compiles]:
        ours = copy.deepcopy(model)
        ours.teacher.cast_weights(dtype)
        if name == OURS:
            compile_model(ours, packs_weights=device == "cpu")
        contenders[name] = partial(train_step, partial(own_loss, ours), build_optimizer(ours, fused=True), dtype)
    check_losses({name: step(images) for name, step in contenders.items()})
    multiply, product_flop = mlp_product(model, images, dtype)

    passes: dict[str, tuple[Callable[[], None], float]] = {
        name: (partial(repeat, partial(step, images), steps), steps * batch_size) for name, step in contenders.items()
    }
    passes[PRODUCT] = partial(repeat, multiply, PRODUCTS_PER_PASS), PRODUCTS_PER_PASS * product_flop / flop
    setting = {
        "size": size,
        "device": device,
        "precision": precision,
        "device_batch_size": batch_size,
        "steps": steps,
        "repeats": repeats,
        "gflop_per_image": round(flop / 1e9, 1),
    }
    own = OURS if compiles else EAGER
    return describe(setting, "images/s", interleave(passes, repeats), [(own, PRODUCT), (own, NAIVE)])


def build_model(size: str) -> DistillationModel:
    """Build a teacher with random weights, and the paper's student for it."""
    config, student_depth = SIZES[size]
    teacher = Data2Vec2(config)
    init_linear_layers(teacher)
    return DistillationModel(teacher, teacher.build_student(depth=student_depth))


def own_loss(model: DistillationModel, images: Tensor) -> Tensor:
    """Compute the loss of a batch of images as Composer's Trainer does."""
    return model.loss(model(images), images)


class NaiveDistillation(nn.Module):
    """Compute the loss of a batch of images as the first version of a user's program does.

    Two whole models with an encoder each, every layer's output kept, attention with one bias an image.

    Args:
        model: The model to copy, with ``layer_mean`` prediction and all tokens regressed.
    """

    def __init__(self, model: DistillationModel) -> None:
        super().__init__()
        self.top_k = model.teacher.config.average_top_k_layers
        self.teacher, self.student = copy.deepcopy(model.teacher), copy.deepcopy(model.student)

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            target = norm_mean(ffn_outputs(self.teacher, images, None)[-self.top_k :])
        return mse_loss(norm_mean(ffn_outputs(self.student, images, self.student.alibi)), target)


def ffn_outputs(transformer: Any, images: Tensor, alibi: Any) -> list[Tensor]:
    x = transformer.encoder.embed_patches(images)
    for block in transformer.encoder.block_list:
        x, _ = run_block(block, x)
    bias = None if alibi is None else alibi(x).repeat(len(x), 1, 1, 1)
    outputs = []
    for block in transformer.block_list:
        x, ffn_output = run_block(block, x, bias)
        outputs.append(ffn_output)
    return outputs


def run_block(block: Block, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    attended = block.norm1(x + attention(block.attn, x, bias))
    ffn_output = block.mlp(attended)
    return block.norm2(attended + ffn_output), ffn_output


def attention(layer: Attention, x_BTD: Tensor, bias_BHTT: Tensor | None) -> Tensor:
    num_inputs, num_tokens, dim = x_BTD.shape
    qkv = layer.qkv(x_BTD).reshape(num_inputs, num_tokens, 3, layer.num_heads, dim // layer.num_heads)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if bias_BHTT is not None:
        scores = scores + bias_BHTT
    attended = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value
    return layer.proj(attended.transpose(1, 2).reshape(num_inputs, num_tokens, dim))


def norm_mean(layers: list[Tensor]) -> Tensor:
    normalized = [instance_norm(layer.transpose(1, 2).float(), eps=NORM_EPS).transpose(1, 2) for layer in layers]
    total = sum(normalized[1:], normalized[0]) / len(normalized)
    return layer_norm(total, total.shape[-1:], eps=NORM_EPS)


def build_optimizer(module: nn.Module, *, fused: bool) -> torch.optim.Optimizer:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=5e-4, betas=(0.9, 0.98), eps=1e-6, fused=fused)


def train_step(
    loss_of: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, dtype: torch.dtype, images: Tensor
) -> Tensor:
    """Train one step, and return the loss before it. Gradients in float16 are not scaled, which takes no less time."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        loss = loss_of(images)
    loss.backward()
    clip_grad_norm_(optimizer.param_groups[0]["params"], CLIPPING_THRESHOLD)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def check_losses(losses: dict[str, Tensor]) -> None:
    """Compare the losses of all contenders with the naive program's."""
    expected = losses[NAIVE].item()
    for name, loss in losses.items():
        if abs(loss.item() - expected) > LOSS_TOLERANCE * expected:
            raise RuntimeError(f"{name!r} finds the loss {loss.item()}, {NAIVE!r} {expected}")


def repeat(work: Callable[[], object], times: int) -> None:
    for _ in range(times):
        work()


def mlp_product(model: DistillationModel, images: Tensor, dtype: torch.dtype) -> tuple[Callable[[], Tensor], int]:
    """Return a matrix product of the shape of the teacher's first MLP layer, and its number of operations."""
    weight = max(model.teacher.block_list[0].parameters(), key=torch.numel).detach().to(dtype)
    num_rows = len(images) * model.teacher.config.num_tokens
    x = torch.randn(num_rows, weight.shape[1], device=weight.device, dtype=dtype)
    return partial(torch.mm, x, weight.T), 2 * num_rows * weight.numel()
