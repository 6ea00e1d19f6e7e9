"""FSDP of a distillation model: one root over its units, the encoder and the blocks."""

from itertools import pairwise
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from d2v_composer.models.distillation import DistillationModel

__all__ = ["join_units", "sharded_units"]


def join_units(model: DistillationModel, mesh: DeviceMesh | None) -> None:
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
    for unit in sharded_units(model).values():
        is_trained = any(parameter.requires_grad for parameter in cast("nn.Module", unit).parameters())
        unit.set_unshard_in_backward(is_trained)
    for blocks in (model.teacher.encoder.block_list, model.teacher.block_list, model.student.block_list):
        for block, following in pairwise(cast("list[FSDPModule]", blocks)):
            block.set_modules_to_forward_prefetch([following])  # gathered before this block computes
    # The first root to run claims the units below it; run this one before any part of the model.
    model.compute(torch.detach, torch.zeros(1))


def sharded_units(model: nn.Module) -> dict[str, FSDPModule]:
    """Return the modules that FSDP shards, except the model itself, by name."""
    return {name: module for name, module in model.named_modules() if name and isinstance(module, FSDPModule)}
