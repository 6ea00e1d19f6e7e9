"""Inspect the weights that FSDP holds, for tests in this process and in others."""

from typing import Any, cast

from torch import nn
from torch.distributed.tensor import DTensor

from d2v_composer.models.execution import sharded_units


def parameter_groups(model: nn.Module) -> dict[str, Any]:
    """Return FSDP's record of each unit."""
    return {name: cast("Any", unit)._get_fsdp_state()._fsdp_param_group for name, unit in sharded_units(model).items()}


def gathered_units(model: nn.Module) -> set[str]:
    """Return the units whose weights are gathered on this rank, or being gathered."""
    return {
        name
        for name, group in parameter_groups(model).items()
        if not group.is_sharded or group._all_gather_result is not None
    }


def gathered_bytes(model: nn.Module) -> int:
    """Return the memory of weights beyond this rank's share."""
    return sum(
        gathered.untyped_storage().nbytes()
        for group in parameter_groups(model).values()
        for parameter in group.fsdp_params
        for gathered in parameter.all_gather_outputs
    )


def share(model: nn.Module) -> float:
    """Return the share of the weights that this rank holds."""
    parameters = cast("list[DTensor]", list(model.parameters()))
    return sum(each.to_local().numel() for each in parameters) / sum(each.numel() for each in parameters)
