"""Compile a distillation model with torch.compile, and check for what torch.compile needs."""

import atexit
import functools
import importlib
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch.utils._pytree import tree_map_only

from d2v_composer.models.attention import FfnBlock
from d2v_composer.models.encoder import Encoder
from d2v_composer.models.targets import LayerMean, instance_norm_mean, norm_mean
from d2v_composer.system.errors import InputError

if TYPE_CHECKING:
    from d2v_composer.objectives.distillation import DistillationModel  # imports Composer

P = ParamSpec("P")
R = TypeVar("R")

# Graphs of a function: one for each input shape, need of gradients, and mode; beyond them a compiled run would fail.
# Audio comes in up to 16 sizes, padded or not. torch's default limit is 8, and 256 for all instances of a function.
MAX_GRAPHS = 1024


def compile_model(model: "DistillationModel", choice: bool | str = True) -> None:
    """Compile parts of a model in place.

    Args:
        model: The model.
        choice: ``True``, or a mode of torch.compile. With ``True``, a GPU runs the teacher as a CUDA graph if possible.
    """
    mode = choice if isinstance(choice, str) else None
    compiling = importlib.import_module("torch._inductor.async_compile")
    # At exit, torch would wait for the kernels that are being compiled. These processes end by themselves after them.
    atexit.unregister(compiling.shutdown_compile_workers)
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MAX_GRAPHS
    # Do not split graphs for DDP: blocks are small enough.
    torch._dynamo.config.optimize_ddp = False
    # Each block is a graph: equal blocks share a compilation, and DDP reduces gradients while other blocks compute.
    parts: list[Any] = list(model.modules())
    encoders = [part for part in parts if isinstance(part, Encoder)]
    for part in parts:
        if isinstance(part, Encoder):
            part.embed_tokens = compiled(part.embed_tokens, mode)
        elif isinstance(part, FfnBlock):
            part.forward = compiled(part.forward, mode)
        elif isinstance(part, LayerMean):
            part.norm_mean = compiled_norm_mean
    model.losses = compiled(model.losses, mode)
    if not torch.cuda.is_available():
        for encoder in encoders:
            if encoder.is_frozen:
                encoder.forward = compiled_with_weights(encoder.forward, mode)
        model.targets_of = compiled_with_weights(model.targets_of, mode)
    else:
        # Not with ALiBi, whose first pass keeps the bias: it would be in the graph's memory.
        is_captured = mode is None and all(encoder.alibi is None for encoder in encoders)
        model.frozen_pass = captured(model.frozen_pass) if is_captured else compiled(model.frozen_pass, mode)


def compiled(
    function: Callable[P, R], mode: str | None = None, options: dict[str, str | int | bool] | None = None
) -> Callable[P, R]:
    """Compile a function to a single graph for each input shape; a call fails if a single graph is impossible."""
    # By default torch makes a dimension symbolic in all later graphs once it has seen two sizes of it.
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode, options=options)


def compiled_with_weights(frozen_pass: Callable[P, R], mode: str | None) -> Callable[P, R]:
    """Compile a function that needs no gradient, with its weights as constants, which must not change any more."""
    function = compiled(frozen_pass, mode)

    @functools.wraps(frozen_pass)
    @torch.no_grad()
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with inductor.patch(freezing=True):  # read when the first call compiles
            return function(*args, **kwargs)

    return call


def captured(frozen_pass: Callable[P, R]) -> Callable[P, R]:
    """Compile a function that needs no gradient, and run the function as a CUDA graph if possible."""
    function = compiled(frozen_pass, options={"triton.cudagraphs": True})

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        # The next replay overwrites the graph's own results.
        return tree_map_only(Tensor, Tensor.clone, function(*args, **kwargs))

    return call


torch.compiler.allow_in_graph(instance_norm_mean)
_norm_mean_of_list = compiled(norm_mean)


def compiled_norm_mean(layers: Iterable[Tensor], *options: Any) -> Tensor:
    """Compute :func:`~d2v_composer.models.targets.norm_mean` with its compiled version."""
    return _norm_mean_of_list(list(layers), *options)


def check_compiler(choice: bool | str) -> None:
    """Check that this machine has what torch.compile needs, unless ``choice`` is false."""
    missing, headers = list[str](), sysconfig.get_path("include")
    if not Path(headers, "Python.h").is_file():
        missing.append(f"Python's headers (python3-dev; {headers} has no Python.h)")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        missing.append("a C++ compiler (g++ or clang++)")
    if choice and missing:
        raise InputError(f"compile: needs {' and '.join(missing)}; install what is missing, or set compile=false")
