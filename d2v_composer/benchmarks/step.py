"""Measure how fast a training step is: the naive program, and our savings added one by one, interleaved in one process.

A step is what Composer's Trainer does with a loaded batch: forward, backward, clipping, AdamW. Every contender starts
from the same weights and must find the same loss. The yardstick is a matrix product of the MLP's shape on the same
device, an upper limit for models made of such products.
"""

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import torch
from composer.callbacks.speed_monitor import get_gpu_flops_available
from composer.core import Precision, State
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from d2v_composer.benchmarks.contenders import (
    EQUAL,
    NAIVE,
    OURS,
    UNBIASED,
    WATCHED,
    Contender,
    build_contenders,
    flop_per_image,
)
from d2v_composer.benchmarks.measure import (
    Pass,
    Rates,
    Result,
    Row,
    Table,
    Target,
    interleave,
    peak_allocated,
    synchronise,
)
from d2v_composer.benchmarks.sized_models import build_sized_model
from d2v_composer.models.distillation import DistillationModel
from d2v_composer.models.precision import PRECISIONS
from d2v_composer.models.sizes import height_and_width

__all__ = ["benchmark_step"]

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
    synchronise(device)


def mlp_product(model: DistillationModel, images: Tensor, dtype: torch.dtype) -> tuple[Callable[[], Tensor], int]:
    """Return a matrix product of the shape of the teacher's first MLP layer, and its number of operations."""
    layers = [layer for layer in model.teacher.block_list[0].modules() if isinstance(layer, nn.Linear)]
    weight = max((layer.weight for layer in layers), key=torch.numel).detach().to(dtype)
    num_rows = len(images) * model.teacher.config.num_steps
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
