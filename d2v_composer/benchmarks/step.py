"""Measure a training step: the naive program and ours, eager and compiled, interleaved in one process.

A step is what Composer's Trainer does with a loaded batch: forward, backward, clipping, AdamW. All contenders start
from the same weights and must find the same loss. The yardstick is a matrix product of the MLP's shape on the same
device, in images/s of a step that were made of such products alone. A timm teacher has no naive program; it is compared
with data2vec 2.0 of equal sizes, by the share of the matrix product's speed that each reaches.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.functional import instance_norm, layer_norm, mse_loss
from torch.nn.utils import clip_grad_norm_

from d2v_composer.benchmarks.measure import Result, interleave, ratio
from d2v_composer.models.attention import Attention, Block, FfnBlock, init_linear_layers
from d2v_composer.models.data2vec2 import Data2Vec2, Data2Vec2Config
from d2v_composer.models.distillation import DistillationModel
from d2v_composer.models.encoder import Encoder, height_and_width
from d2v_composer.models.execution import PRECISIONS, compile_model
from d2v_composer.models.targets import NORM_EPS
from d2v_composer.models.timm_teacher import TimmTeacher, build_timm_model, materialize, teacher_config
from d2v_composer.system.errors import InputError

NAIVE, EAGER, OURS, PRODUCT = "naive", "ours, eager", "ours", "matrix product alone"
EQUAL = "ours, data2vec 2.0 of equal sizes"
LOSS_TOLERANCE = 1e-3
PRODUCTS_PER_PASS = 10
CLIPPING_THRESHOLD = 2.0
# Ours compiled, of the paper's sizes on a CPU, ÷ naive and ÷ matrix product.
PROMISED = {"amp_bf16": (1.25, 0.62), "fp32": (1.12, 0.85)}

# Fields of Data2Vec2Config that are not its default, and the student's depth.
SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "base": ({"prenet_depth": 2, "depth": 10, "average_top_k_layers": 10}, 5),
    "large": ({"embed_dim": 1024, "num_heads": 16, "prenet_depth": 0, "depth": 24, "average_top_k_layers": 18}, 5),
    "quickstart": (
        {"embed_dim": 192, "num_heads": 6, "depth": 6, "average_top_k_layers": 6, "image_size": 32, "patch_size": 4},
        3,
    ),
}


def benchmark_step(
    size: str,
    image_size: str | None,
    device: str,
    precision: str,
    batch_size: int,
    steps: int,
    rounds: int,
    compiles: bool = True,
) -> Result:
    """Measure images per second of each contender.

    Args:
        size: base, large, quickstart, or ``timm/NAME``.
        image_size: Input size of ``timm/NAME``: pixels per side, or HEIGHTxWIDTH; default: timm's.
        device: cpu or cuda.
        precision: fp32, amp_bf16 or amp_fp16.
        batch_size: Images per step.
        steps: Steps in a pass.
        rounds: Measured passes of each contender.
        compiles: Include torch.compile.

    Raises:
        InputError: The timm model cannot be a teacher.
        RuntimeError: The contenders find different losses.
    """
    torch.manual_seed(0)
    model = build_sized_model(size, image_size).to(device)
    shape = height_and_width(model.teacher.config.image_size)
    images = torch.randint(0, 256, (batch_size, 3, *shape), dtype=torch.uint8).to(device)
    contenders = build_contenders(model, precision, compiles)
    check_losses({name: contender.step(images).item() for name, contender in contenders.items() if name != EQUAL})
    product, product_flop = mlp_product(model, images, PRECISIONS[precision])

    passes = {name: partial(repeat, partial(each.step, images), steps, device) for name, each in contenders.items()}
    found = interleave(passes | {PRODUCT: partial(repeat, product, PRODUCTS_PER_PASS, device)}, rounds)
    rates = {name: found[name] * steps * batch_size for name in contenders}
    rates[PRODUCT] = found[PRODUCT] * PRODUCTS_PER_PASS * product_flop / contenders[EAGER].flop

    ours = OURS if compiles else EAGER
    of_naive, of_product = PROMISED[precision] if (size, device, ours) == ("base", "cpu", OURS) else (None, None)
    ratios: list[tuple[str, float, float | None]] = [
        ("ours ÷ matrix product alone", ratio(rates[ours], rates[PRODUCT]), of_product)
    ]
    if NAIVE in rates:
        ratios.append(("ours ÷ naive", ratio(rates[ours], rates[NAIVE]), of_naive))
    if EQUAL in rates:
        flops = (rates[name] * contenders[name].flop for name in (ours, EQUAL))
        ratios.append(("FLOP/s ÷ those of data2vec 2.0 of equal sizes", ratio(*flops), 0.95))
    gflop = contenders[EAGER].flop / 1e9
    setting = {"size": size, "device": device, "precision": precision, "device_batch_size": batch_size}
    return Result(
        title=f"{size}, {device}, {precision}, {batch_size} images a batch, {gflop:.1f} GFLOP an image, "
        f"{rounds} interleaved rounds of {steps} steps",
        unit="images/s",
        setting={**setting, "steps": steps, "rounds": rounds, "gflop_per_image": gflop},
        rates=rates,
        ratios=ratios,
        packages=("torch", "mosaicml", "timm", "triton"),
    )


class NaiveDistillation(nn.Module):
    """Compute the loss of a batch of images.

    Two whole models with an encoder each, every layer's output kept, attention with one bias an image.

    Args:
        model: The model to copy, with ``layer_mean`` prediction and all tokens regressed.
    """

    def __init__(self, model: DistillationModel) -> None:
        super().__init__()
        self.average_top_k_layers = model.teacher.config.average_top_k_layers
        self.teacher = NaiveTransformer(model.teacher.encoder, model.teacher.block_list)
        self.student = NaiveTransformer(model.student.encoder, model.student.block_list)
        self.alibi = model.student.alibi

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.teacher.encode(images)
            target = norm_mean(self.teacher.ffn_outputs(x)[-self.average_top_k_layers :])
        x = self.student.encode(images)
        bias = None
        if self.alibi is not None:
            bias = self.alibi(x).repeat(len(x), 1, 1, 1)
        return mse_loss(norm_mean(self.student.ffn_outputs(x, bias)), target)


class NaiveTransformer(nn.Module):
    def __init__(self, encoder: Encoder, blocks: Sequence[FfnBlock]) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        self.blocks = nn.ModuleList(copy.deepcopy(block) for block in blocks)

    def encode(self, images: Tensor) -> Tensor:
        x = self.encoder.embed_patches(images)
        for block in self.encoder.block_list:
            assert isinstance(block, Block)
            x, _ = run_block(block, x)
        return x

    def ffn_outputs(self, x: Tensor, bias: Tensor | None = None) -> list[Tensor]:
        outputs = []
        for block in self.blocks:
            assert isinstance(block, Block)
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


class Contender:
    """A model, its optimizer, and their training step.

    Args:
        module: The weights.
        loss_of: Images → loss.
        precision: fp32, amp_bf16 or amp_fp16.
        flop: Operations of a step, for one image.
        fused: Use the fused AdamW.
    """

    def __init__(
        self, module: nn.Module, loss_of: Callable[[Tensor], Tensor], precision: str, flop: int, *, fused: bool
    ) -> None:
        self.loss_of = loss_of
        self.flop = flop
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=5e-4, betas=(0.9, 0.98), eps=1e-6, fused=fused)
        device = self.trained[0].device.type
        self.scaler = GradScaler(device, enabled=precision == "amp_fp16")
        self.autocast = partial(torch.autocast, device, PRECISIONS[precision], enabled=precision != "fp32")

    def step(self, images: Tensor) -> Tensor:
        """Train one step, and return the loss before it."""
        with self.autocast():
            loss = self.loss_of(images)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        clip_grad_norm_(self.trained, CLIPPING_THRESHOLD)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach()


def build_contenders(model: DistillationModel, precision: str, compiles: bool) -> dict[str, Contender]:
    """Return the contenders by name; the first one is the baseline."""
    contenders: dict[str, Contender] = {}
    if isinstance(model.teacher, Data2Vec2):
        naive = NaiveDistillation(model)
        contenders[NAIVE] = Contender(naive, naive, precision, flop_per_image(model), fused=False)
    elif (equal := build_equal_model(model.teacher)) is not None:
        contenders[EQUAL] = our_contender(equal.to(next(model.parameters()).device), precision, compiles)
    contenders[EAGER] = our_contender(model, precision, compiles=False)
    if compiles:
        contenders[OURS] = our_contender(model, precision, compiles)
    return contenders


def our_contender(model: DistillationModel, precision: str, compiles: bool) -> Contender:
    """Prepare a copy of a model as a run does."""
    module = copy.deepcopy(model)
    module.teacher.cast_weights(PRECISIONS[precision])
    if compiles:
        compile_model(module, packs_weights=next(module.parameters()).device.type == "cpu")

    def loss_of(images: Tensor) -> Tensor:
        return module.loss(module(images), images)

    return Contender(module, loss_of, precision, flop_per_image(model), fused=True)


def flop_per_image(model: DistillationModel) -> int:
    return model.flops_per_batch(torch.empty(1, 0))


def check_losses(losses: dict[str, float]) -> None:
    """Compare the losses of all contenders with the first one's."""
    first, expected = next(iter(losses.items()))
    for name, loss in losses.items():
        if abs(loss - expected) > LOSS_TOLERANCE * expected:
            raise RuntimeError(f"{name!r} finds the loss {loss}, {first!r} {expected}")


def repeat(work: Callable[[], object], times: int, device: str) -> None:
    for _ in range(times):
        work()
    if device == "cuda":
        torch.cuda.synchronize()


def mlp_product(model: DistillationModel, images: Tensor, dtype: torch.dtype) -> tuple[Callable[[], Tensor], int]:
    """Return a matrix product of the shape of the teacher's first MLP layer, and its number of operations."""
    layers = [layer for layer in model.teacher.block_list[0].modules() if isinstance(layer, nn.Linear)]
    weight = max((layer.weight for layer in layers), key=torch.numel).detach().to(dtype)
    num_rows = len(images) * model.teacher.config.num_tokens
    x = torch.randn(num_rows, weight.shape[1], device=weight.device, dtype=dtype)
    return partial(torch.mm, x, weight.T), 2 * num_rows * weight.numel()


def build_sized_model(size: str, image_size: str | None = None) -> DistillationModel:
    """Build a teacher with random weights, and the paper's student for it.

    Args:
        size: A key of ``SIZES``, or ``timm/NAME``.
        image_size: Input size of ``timm/NAME``: pixels per side, or HEIGHTxWIDTH; default: timm's.

    Raises:
        InputError: The timm model cannot be a teacher.
    """
    if size in SIZES:
        fields, student_depth = SIZES[size]
        return with_student(Data2Vec2(Data2Vec2Config(num_extra_tokens=1, **fields)), depth=student_depth)
    try:
        model: Any = build_timm_model(size, image_size)
    except ValueError as error:
        raise InputError(f"--teacher: {error}") from error
    materialize(model).init_weights()
    teacher = TimmTeacher(model, teacher_config(size, model))
    return DistillationModel(teacher, teacher.build_student())


def build_equal_model(teacher: Any) -> DistillationModel | None:
    """Build a data2vec 2.0 teacher of a timm teacher's sizes, and the paper's student for it.

    Returns:
        ``None`` if the images are not square, as data2vec 2.0's are.
    """
    sizes = teacher.config
    (rows, columns), (height, width) = sizes.grid_size, height_and_width(sizes.image_size)
    if (rows, height) != (columns, width):
        return None
    layers = [layer for layer in teacher.block_list[0].block.mlp.modules() if isinstance(layer, nn.Linear)]
    num_weights = sum(layer.weight.numel() for layer in layers)  # SwiGLU has three matrices
    config = Data2Vec2Config(
        embed_dim=sizes.embed_dim,
        num_heads=sizes.num_heads,
        mlp_ratio=num_weights / (2 * sizes.embed_dim**2),
        prenet_depth=sizes.first_blocks,
        depth=sizes.depth,
        average_top_k_layers=sizes.average_top_k_layers,
        num_extra_tokens=sizes.num_extra_tokens,
        image_size=height,
        patch_size=height // rows,
    )
    return with_student(Data2Vec2(config))


def with_student(teacher: Data2Vec2, **options: Any) -> DistillationModel:
    init_linear_layers(teacher)
    return DistillationModel(teacher, teacher.build_student(**options))
