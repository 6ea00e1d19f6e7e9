"""How fast a training step is: the naive program, and our savings added to it one by one, interleaved in one process.

A step is what Composer's Trainer does with a batch that is there: forward, backward, clipping, AdamW. Every contender
starts from the same weights and has to find the same loss. The yardstick is a matrix product of the MLP's shape on the
same device: nothing that consists of such products can be faster.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from composer.callbacks.speed_monitor import get_gpu_flops_available
from composer.core import Precision, State
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile

from d2v_composer.benchmarks.measure import (
    Rates,
    Target,
    describe_setting,
    interleave,
    peak_allocated,
    progress_bar,
    synchronise,
    versions,
)
from d2v_composer.benchmarks.naive import NaiveDistillation
from d2v_composer.callbacks import Health
from d2v_composer.models.block import init_linear_layers
from d2v_composer.models.compilation import compile_model
from d2v_composer.models.data2vec2 import Data2Vec2, Data2Vec2Config
from d2v_composer.models.distillation import DistillationModel
from d2v_composer.system.machine_info import describe_machine

__all__ = ["PRECISIONS", "SIZES", "StepBenchmark", "StepRow", "benchmark_step", "build_sized_model"]

SIZES = {
    "base": Data2Vec2Config(prenet_depth=2, num_extra_tokens=1, depth=10, average_top_k_layers=10),
    "large": Data2Vec2Config(
        embed_dim=1024, num_heads=16, prenet_depth=0, num_extra_tokens=1, depth=24, average_top_k_layers=18
    ),
    "quickstart": Data2Vec2Config(
        embed_dim=192,
        num_heads=6,
        prenet_depth=2,
        num_extra_tokens=1,
        depth=6,
        average_top_k_layers=6,
        image_size=32,
        patch_size=4,
    ),
}
STUDENT_DEPTH = {"base": 5, "large": 5, "quickstart": 3}
PRECISIONS = {"fp32": torch.float32, "amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}
PACKAGES = ("torch", "mosaicml", "triton")

NAIVE, OURS, UNBIASED, CHECKPOINTED = "naive", "+ torch.compile", "ours, no ALiBi", "ours, checkpointing"
WATCHED = "ours, health each step"
HEALTH_INTERVAL = 100
CLIPPING_THRESHOLD = 2.0
LOSS_TOLERANCE = 1e-3
PRODUCTS_PER_PASS = 10


class StepRow(NamedTuple):
    """What was measured of one contender."""

    name: str
    rates: Rates
    """Images a second."""
    gemm_share: float
    """Of the matrix product's operations a second, by what the paper's formulas need."""
    mfu: float | None
    """Of the card's datasheet; ``None`` for other devices."""
    held_bytes: int
    """Weights and the optimizer's state."""
    step_bytes: int
    """What a step allocates at its peak, besides."""
    loss: float
    attention_kernels: list[str]


class StepBenchmark(NamedTuple):
    """The whole measurement."""

    size: str
    device: str
    precision: str
    device_batch_size: int
    steps: int
    rounds: int
    gflop_per_image: float
    gemm_gflops: float
    machine: dict[str, str | int]
    versions: dict[str, str | None]
    rows: list[StepRow]
    targets: list[Target]

    def as_json(self) -> dict[str, Any]:
        rows = [row._asdict() | {"rates": row.rates.each, "median": row.rates.median} for row in self.rows]
        return self._asdict() | {"rows": rows, "targets": [target._asdict() for target in self.targets]}

    def as_text(self) -> str:
        """A table, and which targets are reached."""
        naive = self.rows[0].rates
        lines = [
            *describe_setting(self.machine, self.versions),
            f"{self.size}, {self.device}, {self.precision}, {self.device_batch_size} images a batch, "
            f"{self.gflop_per_image:.1f} GFLOP an image",
            f"median and range of {self.rounds} rounds of {self.steps} steps, interleaved; GEMM: a product of the "
            f"MLP's shape, {self.gemm_gflops:.0f} GFLOP/s; memory: weights and optimizer, and a step's peak besides",
            "",
            f"{'':24}  {'images/s':>8}  {'range':>15}  {'× naive':>7}  {'% GEMM':>6}  {'MFU %':>5}  {'memory MB':>14}",
        ]
        for row in self.rows:
            extent = f"{min(row.rates.each):.2f} – {max(row.rates.each):.2f}"
            mfu = "" if row.mfu is None else f"{100 * row.mfu:.1f}"
            memory = f"{row.held_bytes / 1e6:.0f} + {row.step_bytes / 1e6:.0f}"
            lines.append(
                f"{row.name:24}  {row.rates.median:8.2f}  {extent:>15}  {row.rates.ratio(naive):7.2f}  "
                f"{100 * row.gemm_share:6.0f}  {mfu:>5}  {memory:>14}"
            )
        kernels = {row.name: ", ".join(row.attention_kernels) for row in self.rows if row.attention_kernels}
        lines += ["", *(f"attention of '{name}': {kernel}" for name, kernel in kernels.items())]
        return "\n".join(lines + [target.verdict for target in self.targets])


class Contender:
    """A model, its optimizer, and their step.

    Args:
        module: What holds the weights.
        loss_of: Images to the loss.
        precision: fp32, amp_bf16 or amp_fp16.
        fused: Whether AdamW is the fused one.
    """

    def __init__(
        self, module: nn.Module, loss_of: Callable[[Tensor], Tensor], precision: str, *, fused: bool = False
    ) -> None:
        self.module = module
        self.loss_of = loss_of
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=fused
        )
        device = self.trained[0].device.type
        self.scaler = GradScaler(device, enabled=precision == "amp_fp16")
        self.autocast = functools.partial(torch.autocast, device, PRECISIONS[precision], enabled=precision != "fp32")

    def step(self, images: Tensor) -> Tensor:
        """One step; the loss before it."""
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
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        tensors = [*self.module.parameters(), *self.module.buffers(), *state]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def benchmark_step(
    size: str, device: str, precision: str, device_batch_size: int, steps: int, rounds: int, compiles: bool = True
) -> StepBenchmark:
    """Measure.

    Args:
        size: base, large or quickstart.
        device: cpu or cuda.
        precision: fp32, amp_bf16 or amp_fp16.
        device_batch_size: Images a step.
        steps: Steps between two looks at the clock.
        rounds: How many such passes of each contender count.
        compiles: Whether torch.compile is among our savings.

    Raises:
        RuntimeError: A contender finds another loss: something else would be measured.
    """
    torch.manual_seed(0)
    model = build_sized_model(size).to(device)
    image_size = model.teacher.config.image_size
    images = torch.randint(0, 256, (device_batch_size, 3, image_size, image_size), dtype=torch.uint8).to(device)
    contenders = dict(build_contenders(model, precision, compiles))
    with progress_bar("steps", (len(contenders) + 1) * (rounds + 1) + len(contenders)) as progress:
        losses, kernels, step_bytes = {}, {}, {}
        for name, contender in contenders.items():
            progress(name)
            losses[name] = contender.step(images).item()
            kernels[name] = attention_kernels(lambda step=contender.step: step(images))
            step_bytes[name] = peak_allocated(lambda step=contender.step: step(images), device)
        check_losses(losses)
        passes = {name: repeated(contender.step, images, steps) for name, contender in contenders.items()}
        gemm, gemm_flop = mlp_product(model, images, PRECISIONS[precision])
        rates = interleave(passes | {"GEMM": gemm}, 1, rounds, progress)
    image_flop = model.flops_per_batch(images) / len(images)
    gemm_flops = rates["GEMM"].scaled(gemm_flop)
    available = card_flops(precision) if device == "cuda" else 0
    rows = []
    for name, contender in contenders.items():
        images_per_second = rates[name].scaled(steps * len(images))
        flops = images_per_second.scaled(image_flop)
        mfu = flops.median / available if available else None
        rows.append(
            StepRow(
                name=name,
                rates=images_per_second,
                gemm_share=flops.ratio(gemm_flops),
                mfu=mfu,
                held_bytes=contender.held_bytes,
                step_bytes=step_bytes[name],
                loss=losses[name],
                attention_kernels=kernels[name],
            )
        )
    return StepBenchmark(
        size=size,
        device=device,
        precision=precision,
        device_batch_size=device_batch_size,
        steps=steps,
        rounds=rounds,
        gflop_per_image=image_flop / 1e9,
        gemm_gflops=gemm_flops.median / 1e9,
        machine=describe_machine(),
        versions=versions(*PACKAGES),
        rows=rows,
        targets=list(find_targets(rows, size, device, precision)),
    )


def build_sized_model(size: str) -> DistillationModel:
    """A teacher of one of the sizes with random weights, and the paper's student for it."""
    teacher = Data2Vec2(SIZES[size])
    init_linear_layers(teacher)
    return DistillationModel(teacher, teacher.build_student(depth=STUDENT_DEPTH[size]))


def build_contenders(model: DistillationModel, precision: str, compiles: bool) -> Iterator[tuple[str, Contender]]:
    """The naive program, our savings added one by one, and ours without a bias and with less memory."""

    def naive(**options: bool) -> Contender:
        module = NaiveDistillation(model, **options)
        return Contender(module, module, precision)

    def ours(
        *,
        frozen: bool = True,
        fused: bool = True,
        compiled: bool = False,
        alibi: bool = True,
        checkpoints: bool = False,
        watched: bool = False,
    ) -> Contender:
        module = copy.deepcopy(model)
        module.student.alibi = module.student.alibi if alibi else None
        if frozen:
            module.teacher.cast_weights(PRECISIONS[precision])
        if compiled:
            compile_model(module, packs_weights=next(module.parameters()).device.type == "cpu")
        if checkpoints:
            module.student.checkpoint_activations()
        loss_of = watched_loss(module) if watched else lambda images: module.loss(module(images), images)
        return Contender(module, loss_of, precision, fused=fused)

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


def watched_loss(model: DistillationModel) -> Callable[[Tensor], Tensor]:
    """The loss, with all that the health callback measures when it is due."""
    health = Health()

    def loss_of(images: Tensor) -> Tensor:
        outputs = model(images)
        with torch.no_grad():
            numbers = health.compare(outputs, model.student.num_extra_tokens)
            torch.cat([torch.stack(list(numbers.values())), model.layer_cosines(images, len(images))]).tolist()
        return model.loss(outputs, images)

    return loss_of


def check_losses(losses: dict[str, float]) -> None:
    """Refuse contenders whose loss is not the naive program's."""
    for name, loss in losses.items():
        if name != UNBIASED and abs(loss - losses[NAIVE]) > LOSS_TOLERANCE * losses[NAIVE]:
            raise RuntimeError(f"{name!r} finds the loss {loss}, {NAIVE!r} {losses[NAIVE]}")


def repeated(step: Callable[[Tensor], Tensor], images: Tensor, steps: int) -> Callable[[], None]:
    """A pass: so many steps, and waiting until the device has done them."""

    def one_pass() -> None:
        for _ in range(steps):
            step(images)
        synchronise(images.device.type)

    return one_pass


def mlp_product(model: DistillationModel, images: Tensor, dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    """A pass of matrix products of the teacher's first MLP layer's shape, and their operations."""
    weight = model.teacher.block_list[0].mlp.fc1.weight.to(dtype)
    num_rows = len(images) * model.teacher.config.num_steps
    x = torch.randn(num_rows, weight.shape[1], device=weight.device, dtype=dtype)

    @torch.inference_mode()
    def one_pass() -> None:
        for _ in range(PRODUCTS_PER_PASS):
            torch.mm(x, weight.T)
        synchronise(weight.device.type)

    return one_pass, PRODUCTS_PER_PASS * 2 * num_rows * weight.numel()


def attention_kernels(step: Callable[[], object]) -> list[str]:
    """Which of scaled_dot_product_attention's ways were taken, as torch's profiler names them."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    prefix = "aten::_scaled_dot_product_"
    names = {event.key.removeprefix(prefix) for event in profiler.key_averages() if event.key.startswith(prefix)}
    return sorted(name for name in names if "backward" not in name)


def card_flops(precision: str) -> int:
    """Operations a second of the GPU's datasheet, without sparsity; 0 where Composer does not know the card."""
    return get_gpu_flops_available(cast("State", SimpleNamespace(precision=Precision(precision))))


def find_targets(rows: list[StepRow], size: str, device: str, precision: str) -> Iterator[Target]:
    """What should be reached with the paper's sizes."""
    by_name = {row.name: row for row in rows}
    ours = by_name.get(OURS, by_name["+ fused AdamW"])
    excess = ours.rates.ratio(by_name[WATCHED].rates) - 1
    yield Target(f"ours, health every {HEALTH_INTERVAL} steps / without", 1 / (1 + excess / HEALTH_INTERVAL), 0.99)
    if size != "base" or OURS not in by_name:
        return
    at_least = {("cpu", "amp_bf16"): (1.25, 0.62), ("cpu", "fp32"): (1.12, 0.85)}
    if (device, precision) in at_least:
        speed, share = at_least[device, precision]
        yield Target("ours / naive", ours.rates.ratio(by_name[NAIVE].rates), speed)
        yield Target("ours / matrix product", ours.gemm_share, share)
    if device == "cuda" and precision != "fp32":
        yield Target("ours / datasheet (MFU)", ours.mfu, 0.4)
        yield Target("with ALiBi / without", ours.rates.ratio(by_name[UNBIASED].rates), 0.95)
