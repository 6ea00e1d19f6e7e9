"""Measure how fast a training step is: the naive program, and our savings added one by one, interleaved in one process.

A step is what Composer's Trainer does with a loaded batch: forward, backward, clipping, AdamW. Every contender starts
from the same weights and must find the same loss. The yardstick is a matrix product of the MLP's shape on the same
device, an upper limit for models made of such products.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from composer.callbacks.speed_monitor import get_gpu_flops_available
from composer.core import Precision, State
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.functional import instance_norm, layer_norm, mse_loss
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile

from d2v_composer.benchmarks.measure import (
    Pass,
    Rates,
    Result,
    Row,
    Table,
    Target,
    interleave,
    peak_allocated,
    synchronize,
)
from d2v_composer.callbacks import Health
from d2v_composer.models.attention import Attention, Block, FfnBlock, init_linear_layers
from d2v_composer.models.data2vec2 import Data2Vec2, Data2Vec2Config
from d2v_composer.models.distillation import DistillationModel
from d2v_composer.models.encoder import Encoder, height_and_width
from d2v_composer.models.execution import PRECISIONS, compile_model
from d2v_composer.models.targets import NORM_EPS
from d2v_composer.models.timm_teacher import PREFIX, TimmTeacher, build_timm_model, materialize, teacher_config
from d2v_composer.system.errors import InputError

# MERGED FROM d2v_composer/benchmarks/step.py: The distillation written without optimizations: the baseline of our


class NaiveDistillation(nn.Module):
    """Compute the loss of a batch of images.

    Args:
        model: The model to copy, with ``layer_mean`` prediction and all time steps regressed.
        shares_encoder: Encode images only once, for teacher and student.
    """

    def __init__(self, model: DistillationModel, shares_encoder: bool = False) -> None:
        super().__init__()
        self.average_top_k_layers = model.teacher.config.average_top_k_layers
        self.shares_encoder = shares_encoder
        self.teacher = NaiveTransformer(model.teacher.encoder, model.teacher.block_list)
        self.student = NaiveTransformer(model.student.encoder, model.student.block_list)
        self.alibi = model.student.alibi

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.teacher.encode(images)
            target = norm_mean(self.teacher.ffn_outputs(x)[-self.average_top_k_layers :])
        if not self.shares_encoder:
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


# MERGED FROM d2v_composer/benchmarks/step.py: Sizes of the benchmarks' models, in a module that imports little:

# Fields of Data2Vec2Config that are not its default.
SIZES: dict[str, dict[str, Any]] = {
    "base": {"prenet_depth": 2, "num_extra_tokens": 1, "depth": 10, "average_top_k_layers": 10},
    "large": {
        "embed_dim": 1024,
        "num_heads": 16,
        "prenet_depth": 0,
        "num_extra_tokens": 1,
        "depth": 24,
        "average_top_k_layers": 18,
    },
    "quickstart": {
        "embed_dim": 192,
        "num_heads": 6,
        "prenet_depth": 2,
        "num_extra_tokens": 1,
        "depth": 6,
        "average_top_k_layers": 6,
        "image_size": 32,
        "patch_size": 4,
    },
}
STUDENT_DEPTH = {"base": 5, "large": 5, "quickstart": 3}


# MERGED FROM d2v_composer/benchmarks/step.py: Models of the benchmarks' sizes, with random weights.


def build_sized_model(size: str, image_size: str | None = None) -> DistillationModel:
    """Build a teacher of a size, or of a model of timm's, and the paper's student for it.

    Args:
        size: One of ``SIZES``, or ``timm/NAME``.
        image_size: Of timm's: pixels a side, or HEIGHTxWIDTH; default timm's for this model.

    Raises:
        InputError: The timm model cannot be a teacher.
    """
    if size.startswith(PREFIX):
        teacher = build_timm_teacher(size, image_size)
        return DistillationModel(teacher, teacher.build_student())
    teacher = Data2Vec2(Data2Vec2Config(**SIZES[size]))
    init_linear_layers(teacher)
    return DistillationModel(teacher, teacher.build_student(depth=STUDENT_DEPTH[size]))


def build_equal_model(timm_teacher: TimmTeacher) -> DistillationModel | None:
    """Build a data2vec 2.0 teacher of a timm teacher's sizes, and the paper's student for it.

    Returns:
        ``None`` if data2vec 2.0 has no such sizes: its images are square.
    """
    sizes = timm_teacher.config
    (rows, columns), (height, width) = sizes.grid_size, height_and_width(sizes.image_size)
    if (rows, height) != (columns, width):
        return None
    mlp = timm_teacher.block_list[0].block.mlp
    num_weights = sum(layer.weight.numel() for layer in mlp.modules() if isinstance(layer, nn.Linear))
    config = Data2Vec2Config(
        embed_dim=sizes.embed_dim,
        num_heads=sizes.num_heads,
        mlp_ratio=num_weights / (2 * sizes.embed_dim**2),  # SwiGLU has three matrices
        prenet_depth=sizes.first_blocks,
        depth=sizes.depth,
        average_top_k_layers=sizes.average_top_k_layers,
        num_extra_tokens=sizes.num_extra_tokens,
        image_size=height,
        patch_size=height // rows,
    )
    teacher = Data2Vec2(config)
    init_linear_layers(teacher)
    return DistillationModel(teacher, teacher.build_student())


def build_timm_teacher(name: str, image_size: str | None) -> TimmTeacher:
    try:
        model: Any = build_timm_model(name, image_size)
    except ValueError as error:
        raise InputError(f"--teacher: {error}") from error
    materialize(model).init_weights()
    return TimmTeacher(model, teacher_config(name, model))


# MERGED FROM d2v_composer/benchmarks/step.py: The programs that the benchmark of a training step compares: a naive

NAIVE, OURS, UNBIASED, CHECKPOINTED = "naive", "+ torch.compile", "ours, no ALiBi", "ours, checkpointing"
WATCHED = "ours, health each step"
EQUAL = "ours, data2vec 2.0 of equal sizes"
CLIPPING_THRESHOLD = 2.0


class Contender:
    """A model, its optimizer, and their training step.

    Args:
        module: The holder of the weights.
        loss_of: Images → loss.
        precision: fp32, amp_bf16 or amp_fp16.
        flop: Operations of a step, for one image.
        fused: Use the fused AdamW.
    """

    def __init__(
        self, module: nn.Module, loss_of: Callable[[Tensor], Tensor], precision: str, *, flop: int, fused: bool = False
    ) -> None:
        self.module = module
        self.loss_of = loss_of
        self.flop = flop
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=fused
        )
        device = self.trained[0].device.type
        self.scaler = GradScaler(device, enabled=precision == "amp_fp16")
        self.autocast = functools.partial(torch.autocast, device, PRECISIONS[precision], enabled=precision != "fp32")

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

    @property
    def held_bytes(self) -> int:
        """Size of weights and optimizer state."""
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        tensors = [*self.module.parameters(), *self.module.buffers(), *state]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def build_contenders(model: DistillationModel, precision: str, compiles: bool) -> Iterator[tuple[str, Contender]]:
    """Yield the naive program, our savings added one by one, and variants of ours."""

    def naive(**options: bool) -> Contender:
        module = NaiveDistillation(model, **options)
        return Contender(module, module, precision, flop=flop_per_image(model))

    ours = functools.partial(our_contender, model, precision)
    if isinstance(model.teacher, Data2Vec2):
        yield NAIVE, naive()
        yield "+ one encoder", naive(shares_encoder=True)
    yield "+ fused attention", ours(frozen=False, fused=False)
    if precision != "fp32":
        yield "+ half frozen weights", ours(fused=False)
    yield "+ fused AdamW", ours()
    if compiles:
        yield OURS, ours(compiled=True)
    yield UNBIASED, ours(compiled=compiles, alibi=False)
    yield CHECKPOINTED, ours(compiled=compiles, checkpoints=True)
    yield WATCHED, ours(compiled=compiles, watched=True)
    if isinstance(model.teacher, TimmTeacher) and (equal := build_equal_model(model.teacher)) is not None:
        yield EQUAL, our_contender(equal.to(next(model.parameters()).device), precision, compiled=compiles)


def our_contender(
    model: DistillationModel,
    precision: str,
    *,
    frozen: bool = True,
    fused: bool = True,
    compiled: bool = False,
    alibi: bool = True,
    checkpoints: bool = False,
    watched: bool = False,
) -> Contender:
    """Build a contender of a copy of a model, with some of our savings."""
    module = copy.deepcopy(model)
    module.student.alibi = module.student.alibi if alibi else None
    if frozen:
        module.teacher.cast_weights(PRECISIONS[precision])
    if compiled:
        compile_model(module, packs_weights=next(module.parameters()).device.type == "cpu")
    if checkpoints:
        module.student.checkpoint_activations()
    loss_of = watched_loss(module) if watched else lambda images: module.loss(module(images), images)
    return Contender(module, loss_of, precision, flop=flop_per_image(model), fused=fused)


def flop_per_image(model: DistillationModel) -> int:
    return model.flops_per_batch(torch.empty(1, 0))


def watched_loss(model: DistillationModel) -> Callable[[Tensor], Tensor]:
    """Return the loss function with all measurements of the health callback."""
    health = Health()

    def loss_of(images: Tensor) -> Tensor:
        outputs = model(images)
        with torch.no_grad():
            numbers = health.compare(outputs, model.student.num_extra_tokens, model.student.has_cls_token)
            torch.cat([torch.stack(list(numbers.values())), model.layer_cosines(images, len(images))]).tolist()
        return model.loss(outputs, images)

    return loss_of


PACKAGES = ("torch", "mosaicml", "triton")

HEALTH_INTERVAL = 100
LOSS_TOLERANCE = 1e-3
PRODUCTS_PER_PASS = 10
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "% GEMM": lambda facts: f"{100 * facts['gemm_share']:.0f}",
    "MFU %": lambda facts: "" if facts["mfu"] is None else f"{100 * facts['mfu']:.1f}",
    "memory MB": lambda facts: f"{facts['held_bytes'] / 1e6:.0f} + {facts['step_bytes'] / 1e6:.0f}",
    "attention": lambda facts: ", ".join(facts["attention_kernels"]),
}


def benchmark_step(
    size: str,
    device: str,
    precision: str,
    device_batch_size: int,
    steps: int,
    rounds: int,
    compiles: bool = True,
    image_size: str | None = None,
) -> Result:
    """Measure.

    Args:
        size: base, large, quickstart, or ``timm/NAME``, which has no naive program, but is compared with data2vec 2.0.
        device: cpu or cuda.
        precision: fp32, amp_bf16 or amp_fp16.
        device_batch_size: Images per step.
        steps: Steps in a pass.
        rounds: Number of passes of each contender that count.
        compiles: Include torch.compile.
        image_size: Of ``timm/NAME``: pixels a side, or HEIGHTxWIDTH; default timm's for this model.

    Raises:
        RuntimeError: A contender finds another loss than the naive program.
    """
    torch.manual_seed(0)
    model = build_sized_model(size, image_size).to(device)
    shape = height_and_width(model.teacher.config.image_size)
    images = torch.randint(0, 256, (device_batch_size, 3, *shape), dtype=torch.uint8).to(device)
    contenders = dict(build_contenders(model, precision, compiles))
    facts = {name: first_steps(contender, images) for name, contender in contenders.items()}
    check_losses({name: each["loss"] for name, each in facts.items()})

    def passing(work: Callable[[], object], times: int) -> Pass:
        return functools.partial(repeat, work, times, device)

    passes = {name: passing(functools.partial(contender.step, images), steps) for name, contender in contenders.items()}
    product, product_flop = mlp_product(model, images, PRECISIONS[precision])
    rates = interleave(passes | {"GEMM": passing(product, PRODUCTS_PER_PASS)}, 1, rounds, "steps")
    gemm_flops = rates["GEMM"].scaled(PRODUCTS_PER_PASS * product_flop)
    card_flops = datasheet_flops(precision) if device == "cuda" else 0
    speeds = {name: rates[name].scaled(steps * len(images)) for name in contenders}
    rows = [
        Row(name, speeds[name], facts[name] | shares(contender, speeds[name], gemm_flops, card_flops))
        for name, contender in contenders.items()
    ]
    setting = {
        "size": size,
        "device": device,
        "precision": precision,
        "device_batch_size": device_batch_size,
        "steps": steps,
        "rounds": rounds,
        "gflop_per_image": flop_per_image(model) / 1e9,
        "gemm_gflops": gemm_flops.median / 1e9,
    }
    targets = list(find_targets(rows, size, device, precision))
    return Result(title_of(setting), PACKAGES, setting, [("rows", Table("", "images/s", rows, COLUMNS))], targets)


def title_of(setting: dict[str, Any]) -> str:
    return (
        "{size}, {device}, {precision}, {device_batch_size} images a batch, {gflop_per_image:.1f} GFLOP an image\n"
        "median and range of {rounds} interleaved rounds of {steps} steps; GEMM: a product of the MLP's shape, "
        "{gemm_gflops:.0f} GFLOP/s; memory: weights and optimizer + peak of a step"
    ).format(**setting)


def shares(contender: Contender, images_per_second: Rates, gemm_flops: Rates, card_flops: int) -> dict[str, Any]:
    """Return what share of the matrix product's speed and of the datasheet's a contender reaches, and what it holds."""
    flops = images_per_second.scaled(contender.flop)
    return {
        "gemm_share": flops.ratio(gemm_flops),
        "mfu": flops.median / card_flops if card_flops else None,
        "held_bytes": contender.held_bytes,
    }


def first_steps(contender: Contender, images: Tensor) -> dict[str, Any]:
    """Take three steps to get the first loss, the attention kernels used, and the memory that a step adds."""
    return {
        "loss": contender.step(images).item(),
        "attention_kernels": attention_kernels(lambda: contender.step(images)),
        "step_bytes": peak_allocated(lambda: contender.step(images), images.device.type),
    }


def attention_kernels(step: Callable[[], object]) -> list[str]:
    """Return which backends of scaled_dot_product_attention a step uses, by the names in torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    prefix = "aten::_scaled_dot_product_"
    names = {event.key.removeprefix(prefix) for event in profiler.key_averages() if event.key.startswith(prefix)}
    return sorted(name for name in names if "backward" not in name)


def check_losses(losses: dict[str, float]) -> None:
    """Refuse contenders whose loss is not the first one's, the naive program's if there is one."""
    first, expected = next(iter(losses.items()))
    for name, loss in losses.items():
        if name not in (UNBIASED, EQUAL) and abs(loss - expected) > LOSS_TOLERANCE * expected:
            raise RuntimeError(f"{name!r} finds the loss {loss}, {first!r} {expected}")


def repeat(work: Callable[[], object], times: int, device: str) -> None:
    for _ in range(times):
        work()
    synchronize(device)


def mlp_product(model: DistillationModel, images: Tensor, dtype: torch.dtype) -> tuple[Callable[[], Tensor], int]:
    """Return a matrix product of the shape of the teacher's first MLP layer, and its number of operations."""
    layers = [layer for layer in model.teacher.block_list[0].modules() if isinstance(layer, nn.Linear)]
    weight = max((layer.weight for layer in layers), key=torch.numel).detach().to(dtype)
    num_rows = len(images) * model.teacher.config.num_tokens
    x = torch.randn(num_rows, weight.shape[1], device=weight.device, dtype=dtype)
    return functools.partial(torch.mm, x, weight.T), 2 * num_rows * weight.numel()


def datasheet_flops(precision: str) -> int:
    """Return the operations per second of the GPU's datasheet, without sparsity; 0 for a card unknown to Composer."""
    return get_gpu_flops_available(cast("State", SimpleNamespace(precision=Precision(precision))))


def find_targets(rows: list[Row], size: str, device: str, precision: str) -> Iterator[Target]:
    """Yield the targets, most of them for the paper's sizes."""
    rates = {row.name: row.rates for row in rows}
    ours = next(row for row in reversed(rows) if row.name in (OURS, "+ fused AdamW"))

    def speed(baseline: str) -> float:
        own, other = ours.rates, rates[baseline]
        assert own is not None
        assert other is not None
        return own.ratio(other)

    excess = speed(WATCHED) - 1
    yield Target(f"ours, health every {HEALTH_INTERVAL} steps / without", 1 / (1 + excess / HEALTH_INTERVAL), 0.99)
    equal = next((row for row in rows if row.name == EQUAL), None)
    if equal is not None:
        share = ours.facts["gemm_share"] / equal.facts["gemm_share"]
        yield Target("share of the matrix product / that of data2vec 2.0 of equal sizes", share, 0.95)
    if size != "base" or ours.name != OURS:
        return
    at_least = {("cpu", "amp_bf16"): (1.25, 0.62), ("cpu", "fp32"): (1.12, 0.85)}
    if (device, precision) in at_least:
        of_naive, of_gemm = at_least[device, precision]
        yield Target("ours / naive", speed(NAIVE), of_naive)
        yield Target("ours / matrix product", ours.facts["gemm_share"], of_gemm)
    if device == "cuda" and precision != "fp32":
        yield Target("ours / datasheet (MFU)", ours.facts["mfu"], 0.4)
        yield Target("with ALiBi / without", speed(UNBIASED), 0.95)
