"""FSDP of a whole distillation model: one root over the units, which are the encoder and the blocks."""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from d2v_composer.models.distillation import DistillationModel

__all__ = ["join_units", "sharded_units"]


def join_units(model: DistillationModel, mesh: DeviceMesh | None) -> None:
    """Make the model the FSDP root of the units that Composer made of its encoder and blocks.

    Without it each unit is a root of its own. FSDP keeps a root's weights gathered after forward, for the backward pass
    that usually follows at once; the frozen teacher has none, and would stay whole on every GPU. Roots do not overlap
    their all-gathers with each other's computation either.

    Args:
        model: As Composer's Trainer sharded it; changed in place.
        mesh: The devices that share its weights; ``None``: all.
    """
    fully_shard(model, mesh=mesh)  # it has no weights beyond its units'
    for name in model.forward_methods:
        register_fsdp_forward_method(model, name)
    for unit in sharded_units(model).values():
        is_trained = any(parameter.requires_grad for parameter in cast("nn.Module", unit).parameters())
        unit.set_unshard_in_backward(is_trained)
    for stack in (model.teacher.encoder.block_list, model.teacher.block_list, model.student.block_list):
        prefetch_next(stack)
    # The first root to run claims the units below it: this one, whichever part of the model is called first.
    model.compute(torch.detach, torch.zeros(1))


def prefetch_next(blocks: Sequence[nn.Module]) -> None:
    """Let each block start the next one's all-gather before it computes, which no block is called without."""
    for block, following in pairwise(blocks):
        assert isinstance(block, FSDPModule)
        assert isinstance(following, FSDPModule)
        block.set_modules_to_forward_prefetch([following])


def sharded_units(model: nn.Module) -> dict[str, FSDPModule]:
    """The modules that FSDP shards, the model itself left out, by name."""
    return {name: module for name, module in model.named_modules() if name and isinstance(module, FSDPModule)}
