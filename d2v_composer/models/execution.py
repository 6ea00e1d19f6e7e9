"""Choose how a distillation model runs: torch.compile block by block, precision, and FSDP with one root."""

import atexit
import functools
import importlib
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils._pytree import tree_map_only

from d2v_composer.models.attention import FfnBlock
from d2v_composer.models.encoder import Encoder
from d2v_composer.models.projection import Projection
from d2v_composer.models.targets import instance_norm_mean, norm_mean
from d2v_composer.models.transformer import Transformer

if TYPE_CHECKING:
    from d2v_composer.models.distillation import Distillation  # imports Composer

P = ParamSpec("P")
R = TypeVar("R")

# Graphs of a function: one for each input shape, need of gradients, and mode; beyond them a compiled run would fail.
# Audio comes in up to 16 sizes, padded or not. torch's default limit is 8, and 256 for all instances of a function.
MAX_GRAPHS = 1024


def compile_model(model: "Distillation", joins_frozen_blocks: bool = True, choice: bool | str = True) -> None:
    """Compile a model's blocks, patch embedding, norm_mean and loss in place, for steps and evaluations.

    Blocks are graphs of their own: equal blocks share a compilation; DDP reduces a block's gradients while the next
    ones are computed; activation checkpointing and FSDP work on blocks.

    Args:
        model: Changed; its weights may still move to a GPU.
        joins_frozen_blocks: Compile the frozen blocks of a training step as whole graphs. On a CPU the weights are in
            the layout of its matrix products, which holds them twice.
        choice: A mode of torch.compile. With ``True``, a GPU starts the joined blocks as one CUDA graph.
    """
    mode = choice if isinstance(choice, str) else None
    compiling = importlib.import_module("torch._inductor.async_compile")
    # At exit, torch would wait for the kernels that are being compiled. These processes end by themselves after them.
    atexit.unregister(compiling.shutdown_compile_workers)
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MAX_GRAPHS
    # Do not split graphs for DDP: blocks are small enough.
    torch._dynamo.config.optimize_ddp = False
    parts: list[Any] = list(model.modules())
    encoders = [part for part in parts if isinstance(part, Encoder)]
    for part in parts:
        if isinstance(part, Encoder):
            part.embed_tokens = compiled(part.embed_tokens, mode)
        elif isinstance(part, FfnBlock):
            part.forward = compiled(part.forward, mode)
        elif hasattr(part, "layer_mean"):
            part.layer_mean = part.layer_mean.changed(norm_mean=compiled_norm_mean)
    model.losses = compiled(model.losses, mode)
    if joins_frozen_blocks and not torch.cuda.is_available():
        for encoder in encoders:
            if encoder.is_frozen:
                encoder.forward = compiled_with_weights(encoder.forward, mode)
        model.targets_of = compiled_with_weights(model.targets_of, mode)
    elif joins_frozen_blocks:
        # Not with ALiBi, whose first pass keeps the bias: it would be in the graph's memory.
        is_captured = mode is None and all(encoder.alibi is None for encoder in encoders)
        model.frozen_pass = captured(model.frozen_pass) if is_captured else compiled(model.frozen_pass, mode)


def compiled(function: Callable[P, R], mode: str | None = None, **options: Any) -> Callable[P, R]:
    """Compile a function as a single graph for each input shape; calling it fails if that is impossible."""
    # By default torch makes a dimension symbolic in all later graphs once it has seen two sizes of it.
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode, **options)


def compiled_with_weights(frozen_pass: Callable[P, R], mode: str | None) -> Callable[P, R]:
    """Compile a function without gradient together with its weights, which must not change afterwards."""
    function = compiled(frozen_pass, mode)

    @functools.wraps(frozen_pass)
    @torch.no_grad()
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with inductor.patch(freezing=True):  # read when the first call compiles
            return function(*args, **kwargs)

    return call


def captured(frozen_pass: Callable[P, R]) -> Callable[P, R]:
    """Compile a function without gradient as a CUDA graph; if that is impossible, Inductor runs it as usual."""
    function = compiled(frozen_pass, options={"triton.cudagraphs": True})

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        # The next replay overwrites the graph's own results.
        return tree_map_only(Tensor, Tensor.clone, function(*args, **kwargs))

    return call


torch.compiler.allow_in_graph(instance_norm_mean)
_norm_mean_of_list = compiled(norm_mean)


def compiled_norm_mean(layers: Iterable[Tensor], *options: Any) -> Tensor:
    """Compute norm_mean in one pass over all layers, which are all in memory at once."""
    return _norm_mean_of_list(list(layers), *options)


def find_missing() -> str | None:
    """Return what torch.compile needs but this machine lacks ('needs …'), or ``None``."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        return "needs a C++ compiler, and neither g++ nor clang++ was found"
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").is_file():
        return f"needs Python's headers (python3-dev), and {headers} has no Python.h"
    return None


# Name → compute dtype of linear layers.
PRECISIONS = {"fp32": torch.float32, "amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


class Precision(NamedTuple):
    dtype: torch.dtype
    """Dtype in which linear layers compute."""
    trainer: str
    """Precision of Composer's Trainer."""
    cpu_bf16: bool
    """The model autocasts to bfloat16 itself: on a CPU, the Trainer does not support amp_bf16."""

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Dtype of autocast; ``None`` turns autocast off."""
        return None if self.dtype == torch.float32 else self.dtype


def name_precision(choice: str, on_gpu: bool | None = None) -> str:
    """Resolve a precision: ``auto`` is the fastest one for which the GPU or the CPU has instructions."""
    if choice != "auto":
        return choice
    if torch.cuda.is_available() if on_gpu is None else on_gpu:
        return "amp_bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "amp_fp16"
    # A CPU emulates bfloat16 without such instructions: a matrix product took a hundred times as long as in float32.
    # Each x86 with AMX has AVX-512's, too; other architectures compute in float32.
    return "amp_bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def choose_precision(choice: str) -> Precision:
    """Return the settings for computing in a precision on this machine's GPU, or on its CPU if it has none."""
    name = name_precision(choice)
    cpu_bf16 = name == "amp_bf16" and not torch.cuda.is_available()
    return Precision(PRECISIONS[name], "fp32" if cpu_bf16 else name, cpu_bf16)


def shard_unit(unit: nn.Module, mp_policy: MixedPrecisionPolicy, **options: Any) -> FSDPModule:
    """Shard an FSDP unit with torch's ``fully_shard``, so that it computes the same as under DDP and autocast.

    Composer's policy casts each unit's input to half precision, and with it the residual stream, which starts at the
    encoder's positions.
    """
    param_dtype = None if isinstance(unit, Encoder) else mp_policy.param_dtype
    policy = replace(mp_policy, param_dtype=param_dtype, cast_forward_inputs=False)
    return fully_shard(unit, mp_policy=policy, **options)


def join_units(model: "Distillation", mesh: DeviceMesh | None) -> None:
    """Make the model the FSDP root of the units that Composer wrapped.

    Otherwise each unit is a root. FSDP keeps a root's weights gathered after forward, for the backward pass that
    usually follows; a frozen teacher has none, and would stay gathered on every GPU. Roots also do not overlap their
    all-gathers with computation.

    Args:
        model: As sharded by Composer's Trainer; changed in place.
        mesh: The devices that share the weights; ``None``: all.
    """
    fully_shard(model, mesh=mesh)  # it has no weights outside its units
    for name in model.forward_methods:
        register_fsdp_forward_method(model, name)
    # Gradients pass a frozen one, too.
    projections = {part for each in model.modules() if isinstance(each, Projection) for part in each.modules()}
    for unit in sharded_units(model).values():
        is_trained = any(parameter.requires_grad for parameter in cast("nn.Module", unit).parameters())
        unit.set_unshard_in_backward(is_trained or unit in projections)
    for part in model.modules():
        blocks = part.block_list if isinstance(part, Encoder | Transformer) else []
        for block, following in pairwise(blocks):
            block.set_modules_to_forward_prefetch([following])  # gathered before this block computes
    # The first root to run claims the units below it; run this one before any part of the model.
    model.compute(torch.detach, torch.zeros(1))


def sharded_units(model: nn.Module) -> dict[str, FSDPModule]:
    """Return the modules that FSDP shards, by name, without the model itself."""
    return {name: module for name, module in model.named_modules() if name and isinstance(module, FSDPModule)}
