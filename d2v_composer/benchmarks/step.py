"""Measure a training step of this package, eager and compiled, and a naive program's step.

A step is a forward pass, a backward pass, gradient clipping and AdamW, on a batch in memory. The program ``trainer``
is this package's step in Composer's Trainer. The row "matrix product alone" has the images or clips per second that a
step would reach if all its operations were as fast as one large matrix product.
"""

import copy
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import instance_norm, layer_norm, mse_loss
from torch.nn.utils import clip_grad_norm_
from torch.profiler import profile

from d2v_composer.benchmarks import interleave, result_of
from d2v_composer.config.load import load_config
from d2v_composer.config.schema import TrainConfig
from d2v_composer.models import attention
from d2v_composer.models.attention import init_linear_layers
from d2v_composer.models.configs import RELEASED, ImageEncoderConfig, TeacherConfig
from d2v_composer.models.data2vec2 import Data2Vec2
from d2v_composer.models.precision import PRECISIONS, choose_precision, name_precision
from d2v_composer.models.provenance import Record
from d2v_composer.models.targets import NORM_EPS
from d2v_composer.objectives.compilation import check_compiler, compile_model
from d2v_composer.objectives.distillation import DistillationModel
from d2v_composer.runs.trainer import build_optimizer, build_trainer
from d2v_composer.system.errors import InputError
from d2v_composer.system.processes import obey_signals

NAIVE, EAGER, OURS, TRAINER, PRODUCT = "naive", "eager", "ours", "trainer", "matrix product alone"
LOSS_TOLERANCE = 1e-3
CLIPPING_THRESHOLD = 2.0
DISTILL = Path(__file__).parents[1] / "yamls" / "distill.yaml"
# Nothing is kept, and no warm-up needs more batches than there are.
CHANGES = ["save_folder=null", "progress_bar=false", "loggers.jsonl.filename=/dev/null", "scheduler.t_warmup=0ba"]
PROFILED_STEPS = 3
ATTENTION = re.compile("_scaled_dot_product_|flash|fmha|sdpa|flex_attention")

# A teacher's sizes, and the student's depth.
SMALL = TeacherConfig(
    encoder=ImageEncoderConfig(embed_dim=192, num_heads=6, num_extra_tokens=1, image_size=32, patch_size=4),
    depth=6,
    average_top_k_layers=6,
)
SIZES = {**{name: (config, 5) for name, config in RELEASED.items()}, "quickstart": (SMALL, 3)}


def benchmark(
    *,
    size: str,
    precision: str,
    batch_size: int | None,
    repeats: int,
    no_compile: bool,
    only: str | None,
    loop: str,
    trace: Path | None,
    overrides: Sequence[str],
) -> Record:
    """Measure the images or clips per second of each program; the arguments are the options of ``d2v benchmark step``.

    Raises:
        InputError: A setting is wrong, or torch.compile lacks a compiler.
        RuntimeError: The programs compute different losses.
    """
    on_gpu = torch.cuda.is_available()
    precision = name_precision(precision)
    steps, products = (20, 200) if on_gpu else (1, 40)
    batch_size = batch_size or (256 if on_gpu else 8)
    # A list of batches does not tell their size. On a CPU, memory_monitor warns.
    batch = [f"device_train_microbatch_size={batch_size}", *([] if on_gpu else ["callbacks.memory_monitor=null"])]
    config = load_config(
        [str(DISTILL), f"precision={precision}", f"compile={not no_compile}", *CHANGES, *batch, *overrides]
    )
    check_compiler(config.compile)
    if config.student.model is not None:
        raise InputError(
            f"student.model: must be null, got {config.student.model}; --size chooses the teacher and the student"
        )
    torch.manual_seed(0)
    model = build_model(size)
    encoder = model.teacher.encoder
    images = encoder.noise(batch_size).to("cuda" if on_gpu else "cpu")
    flop = model.flops_per_batch(images[:1])
    names = [only] if only else [NAIVE, EAGER, OURS][: 3 - no_compile]
    contender = names[-1]
    names += [TRAINER] if loop == TRAINER else []
    with ExitStack() as at_end:
        runs = {name: build_run(name, model, config, images, steps, at_end) for name in names}
        # Only now: a Trainer allows TF32.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
        check_losses({name: run(1) for name, run in runs.items()})
        multiply, product_flop = mlp_product(model, images, PRECISIONS[precision])
        passes = {name: (partial(run, steps), float(steps * batch_size)) for name, run in runs.items()}
        passes[PRODUCT] = partial(repeat, multiply, products), products * product_flop / flop
        rates = interleave(passes, repeats)
        profiled = profile_steps(runs[names[-1]], trace)
    setting = {
        "size": size,
        "device": images.device.type,
        "precision": precision,
        "device_batch_size": batch_size,
        "input_shape": list(images.shape[1:]),
        "steps": steps,
        "repeats": repeats,
        "gflop_per_image": round(flop / 1e9, 1),
        **profiled,
    }
    compared = [(contender, PRODUCT), (contender, NAIVE), (TRAINER, contender)]
    return result_of(
        setting, f"{encoder.input_name}/s", rates, [pair for pair in compared if rates.keys() >= set(pair)]
    )


def build_run(
    name: str, model: DistillationModel, config: TrainConfig, images: Tensor, steps: int, at_end: ExitStack
) -> Callable[[int], Tensor]:
    """Return a function that trains for a number of steps and returns the last loss, a scalar.

    Args:
        name: Name of the program.
        images: The batch of every step.
        steps: Number of batches in an epoch of the Trainer.
        at_end: Exit stack that closes the Trainer.
    """
    dtype = PRECISIONS[config.precision]
    if name == NAIVE:
        teacher, student = (copy.deepcopy(module).to(images.device) for module in (model.teacher, model.student))
        optimizer = torch.optim.AdamW(student.parameters(), config.optimizer.lr, fused=False)
        return partial(repeat, partial(train_step, partial(naive_loss, teacher, student), optimizer, dtype, images))
    ours = copy.deepcopy(model).to(images.device)
    ours.teacher.cast_weights(dtype)
    if name != EAGER and config.compile:
        compile_model(ours, choice=config.compile)
    optimizer = build_optimizer(config.optimizer, ours)
    if name == TRAINER:
        return in_trainer(ours, optimizer, config, images, steps, at_end)
    return partial(repeat, partial(train_step, lambda x: ours.loss(ours(x), x), optimizer, dtype, images))


def in_trainer(
    model: DistillationModel,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    images: Tensor,
    steps: int,
    at_end: ExitStack,
) -> Callable[[int], Tensor]:
    """Return a function that trains for a number of steps in Composer's Trainer, on batches in the host's memory."""
    model.cpu_bf16 = choose_precision(config.precision).cpu_bf16
    modality = model.teacher.encoder.config.modality
    batch = {modality: images.cpu().pin_memory() if images.is_cuda else images}
    trainer = build_trainer(
        config,
        model,
        [batch] * steps,
        {"data": {"modality": modality}},
        optimizers=optimizer,
        spin_dataloaders=False,
    )
    at_end.callback(trainer.close)

    def run(times: int) -> Tensor:
        trainer.fit(duration=f"{times}ba")
        obey_signals()
        return torch.tensor(trainer.state.total_loss_dict["loss/train/total"])

    return run


def profile_steps(run: Callable[[int], Tensor], trace: Path | None) -> Record:
    """Profile a few steps and, if ``trace`` is given, write the profile to this file.

    Returns:
        A dict with the names of the attention operations, the number and the total milliseconds of a step's GPU
        kernels, and the peak GPU memory in GB.
    """
    with profile() as profiler:
        run(PROFILED_STEPS)
    events = profiler.key_averages()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
        trace.with_suffix(".txt").write_text(events.table("self_device_time_total", row_limit=40))
    kernels = [event for event in events if event.device_type.name == "CUDA" and not event.is_user_annotation]
    return {
        "attention": sorted({event.key[:80] for event in events if ATTENTION.search(event.key)}),
        "gpu_kernels": sum(kernel.count for kernel in kernels) // PROFILED_STEPS,
        "gpu_ms": sum(kernel.self_device_time_total for kernel in kernels) / 1e3 / PROFILED_STEPS,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def build_model(size: str) -> DistillationModel:
    """Build a teacher of a size in ``SIZES``, with random weights, and a student for this teacher."""
    config, student_depth = SIZES[size]
    teacher = Data2Vec2(config)
    init_linear_layers(teacher)
    return DistillationModel(teacher, teacher.build_student(depth=student_depth))


def naive_loss(teacher: Any, student: Any, images: Tensor) -> Tensor:
    """Compute the loss of a batch, a scalar, without a shared encoder or fused attention."""
    with patch.object(attention, "attend", attend):
        with torch.no_grad():
            _, layers = teacher.forward_blocks(teacher.encode(images))
            target = norm_mean(layers[-teacher.config.average_top_k_layers :], student.layer_mean.final_layer_norm)
        _, layers = student.forward_blocks(student.encode(images))
        return mse_loss(norm_mean(layers, student.layer_mean.final_layer_norm), target)


def attend(query_BHTK: Tensor, key_BHTK: Tensor, value_BHTK: Tensor, bias: Tensor | None) -> Tensor:
    scores_BHTT = (query_BHTK * query_BHTK.shape[-1] ** -0.5) @ key_BHTK.transpose(-2, -1)
    scores_BHTT = scores_BHTT if bias is None else scores_BHTT + bias.contiguous()  # its rows are aligned for kernels
    return scores_BHTT.softmax(dim=-1, dtype=torch.float32).to(value_BHTK.dtype) @ value_BHTK


def norm_mean(layers: list[Tensor], final_layer_norm: bool) -> Tensor:
    normalized = [instance_norm(layer.transpose(1, 2).float(), eps=NORM_EPS).transpose(1, 2) for layer in layers]
    total = sum(normalized[1:], normalized[0]) / len(normalized)
    return layer_norm(total, total.shape[-1:], eps=NORM_EPS) if final_layer_norm else total


def train_step(
    loss_of: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, dtype: torch.dtype, images: Tensor
) -> Tensor:
    """Train one step; return the loss, a scalar."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        loss = loss_of(images)
    loss.backward()
    clip_grad_norm_([tensor for group in optimizer.param_groups for tensor in group["params"]], CLIPPING_THRESHOLD)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def check_losses(losses: dict[str, Tensor]) -> None:
    """Check that all programs compute nearly the same loss.

    Raises:
        RuntimeError: A loss differs from the first loss by more than the share ``LOSS_TOLERANCE`` of the first loss.
    """
    first, expected = next((name, loss.item()) for name, loss in losses.items())
    for name, loss in losses.items():
        if not abs(loss.item() - expected) <= LOSS_TOLERANCE * expected:  # NaN is not
            raise RuntimeError(f"{name!r} computes a loss of {loss.item()}, but {first!r} computes {expected}")


def repeat(work: Callable[[], Tensor], times: int) -> Tensor:
    """Call ``work`` repeatedly, and return the last result."""
    for _ in range(times - 1):
        work()
    return work()


def mlp_product(model: DistillationModel, images: Tensor, dtype: torch.dtype) -> tuple[Callable[[], Tensor], int]:
    """Return a function that computes a matrix product of an MLP layer's shape, and the number of its operations."""
    weight = max(model.teacher.block_list[0].parameters(), key=torch.numel).detach().to(images.device, dtype)
    num_rows = len(images) * model.teacher.encoder.num_tokens(images.shape[1:])
    x = torch.randn(num_rows, weight.shape[1], device=weight.device, dtype=dtype)
    return partial(torch.mm, x, weight.T), 2 * num_rows * weight.numel()
