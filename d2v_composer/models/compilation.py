"""torch.compile of a whole distillation model, piece by piece."""

import functools
import importlib
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._inductor import config as inductor

from d2v_composer.models.distillation import DistillationModel
from d2v_composer.models.targets import norm_mean, regression_loss
from d2v_composer.system.worker_lifetime import block_sigterm

__all__ = ["compile_model", "find_missing"]

P = ParamSpec("P")
R = TypeVar("R")

# Graphs of one piece: by input shape, by what wants a gradient, training or evaluation. torch's own limit is 8.
MAX_GRAPHS = 64


def find_missing() -> str | None:
    """What torch.compile needs and this machine has not: 'needs …'; ``None``: nothing."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        return "needs a C++ compiler, and neither g++ nor clang++ was found"
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").is_file():
        return f"needs Python's headers (python3-dev), and {headers} has no Python.h"
    return None


def compile_model(model: DistillationModel, packs_weights: bool = False) -> None:
    """Compile in place what a step and an evaluation consist of: blocks, patch embedding, norm_mean, loss.

    Block by block and not as one graph: all blocks of a kind share one compilation, so that it takes seconds instead of
    minutes; gradients are ready, and reduced over the ranks, while the next block's are computed; activation
    checkpointing and FSDP work on blocks as they are; and evaluations use what training compiled.

    Args:
        model: Changed; its weights may move to a GPU later.
        packs_weights: Make whole graphs of the frozen passes, with their weights in the layout that a CPU's matrix
            products want; they are held twice then.
    """
    with block_sigterm():  # which starts the processes that compile: a run that SIGTERM stops may need them once more
        importlib.import_module("torch._inductor.async_compile")
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    # The blocks are small enough as they are: nothing is to be cut for DDP's sake.
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
    """The compiled function; one that cannot be compiled as a whole is an error when it is called."""
    return torch.compile(function, fullgraph=True)


def compiled_with_weights(frozen_pass: Callable[P, R]) -> Callable[P, R]:
    """A function that takes no gradient and whose weights nobody changes, compiled together with them."""
    function = compiled(frozen_pass)

    @functools.wraps(frozen_pass)
    @torch.no_grad()
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with inductor.patch(freezing=True):  # read when the first call compiles
            return function(*args, **kwargs)

    return call


_norm_mean_of_list = compiled(norm_mean)


def compiled_norm_mean(layers: Iterable[Tensor], num_extra_tokens: int = 0) -> Tensor:
    """norm_mean in one pass over all layers, which are all held for it."""
    return _norm_mean_of_list(list(layers), num_extra_tokens)
