"""torch.compile of a distillation model, block by block."""

import atexit
import functools
import importlib
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._inductor import config as inductor

from d2v_composer.models.distillation import DistillationModel
from d2v_composer.models.targets import Normalisation, norm_mean, regression_loss
from d2v_composer.system.worker_lifetime import block_stop_signals

__all__ = ["compile_model"]

P = ParamSpec("P")
R = TypeVar("R")

# Graphs of a function: one for each input shape, need of gradients, and mode. torch's default limit is 8.
MAX_GRAPHS = 64


def compile_model(model: DistillationModel, packs_weights: bool = False) -> None:
    """Compile the parts of a step and of an evaluation in place: blocks, patch embedding, norm_mean, loss.

    Blocks instead of one graph: equal blocks share a compilation, which takes seconds instead of minutes; DDP reduces a
    block's gradients while the next ones are computed; activation checkpointing and FSDP work on blocks; and evaluation
    uses the graphs of training.

    Args:
        model: Changed; its weights may still move to a GPU.
        packs_weights: Compile the frozen passes as whole graphs with their weights in the layout of a CPU's matrix
            products, which holds the weights twice.
    """
    with block_stop_signals():  # starts the compiling processes, which a run that is stopped may still need
        compiling = importlib.import_module("torch._inductor.async_compile")
    # At exit, torch would wait for the kernels that are being compiled. These processes end by themselves after them.
    atexit.unregister(compiling.shutdown_compile_workers)
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    # Do not split graphs for DDP: blocks are small enough.
    torch._dynamo.config.optimize_ddp = False
    encoder, teacher, student = model.teacher.encoder, model.teacher, model.student
    encoder.embed_patches = compiled(encoder.embed_patches)
    for block in [*encoder.block_list, *teacher.block_list, *student.block_list]:
        block.forward = compiled(block.forward)
    for transformer in (teacher, student):
        transformer.norm_mean = compiled_norm_mean
    model.regression_loss = compiled(regression_loss)
    if packs_weights:
        encoder.forward = compiled_with_weights(encoder.forward)
        teacher.targets = compiled_with_weights(teacher.targets)


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function as a single graph; calling it raises an error if that is impossible."""
    return torch.compile(function, fullgraph=True)


def compiled_with_weights(frozen_pass: Callable[P, R]) -> Callable[P, R]:
    """Compile a function without gradient together with its weights, which must not change."""
    function = compiled(frozen_pass)

    @functools.wraps(frozen_pass)
    @torch.no_grad()
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with inductor.patch(freezing=True):  # read when the first call compiles
            return function(*args, **kwargs)

    return call


_norm_mean_of_list = compiled(norm_mean)


def compiled_norm_mean(
    layers: Iterable[Tensor], num_extra_tokens: int = 0, normalisation: Normalisation = "instance"
) -> Tensor:
    """Compute norm_mean in one pass over all layers, which are all in memory at once."""
    return _norm_mean_of_list(list(layers), num_extra_tokens, normalisation)
