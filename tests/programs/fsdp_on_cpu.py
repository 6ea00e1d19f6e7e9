"""recipes/train.py with FSDP between processes on a CPU, which it refuses: ``fsdp_on_cpu.py RUN's arguments``.

torch 2.7's gloo adds instead of averaging when it reduces and scatters; here it averages. The weights that each rank
holds are checked throughout the run. With precision=amp_bf16 they are gathered in bfloat16, and in half precision
norms compute in float32, as on a GPU: on a CPU Composer's Trainer has fp32, and autocast leaves norms alone.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch.distributed
from composer import Callback, Event, Logger, State
from composer.core import Precision
from composer.distributed import fsdp2
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.distributed.tensor import DTensor
from torch.nn.functional import layer_norm

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
import small_vits  # noqa: F401  (they are registered in timm)
from d2v_composer.config import schema
from d2v_composer.models.attention import FfnBlock
from d2v_composer.models.execution import sharded_units
from d2v_composer.system import command_line
from recipes import train

RESHARDS = not any("reshard_after_forward: false" in argument for argument in sys.argv)

reduce_scatter = torch.distributed.reduce_scatter_tensor


def averaging(output: Tensor, input: Tensor, op: Any = ReduceOp.SUM, **options: Any) -> Any:
    done = reduce_scatter(output, input, op=ReduceOp.SUM, **options)
    if op == ReduceOp.AVG:
        output.div_(torch.distributed.get_world_size())
    return done


def norm_in_float32(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return layer_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)


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


class HoldsItsShare(Callback):
    """Refuse that a rank holds more than its share of the weights after a forward or backward pass or a retrieval.

    With reshard_after_forward=false it may, and nothing is measured. Print the dtypes of blocks' inputs, too.
    """

    looked_at = (Event.FIT_START, Event.AFTER_FORWARD, Event.AFTER_BACKWARD, Event.BATCH_END)

    def __init__(self) -> None:
        self.largest = 0.0
        self.dtypes: set[torch.dtype] = set()

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event in self.looked_at and RESHARDS:
            gathered = gathered_units(state.model), gathered_bytes(state.model)
            assert gathered == (set(), 0), f"{event}: {gathered}"
            self.largest = max(self.largest, share(state.model))
        if event is Event.FIT_START:
            for block in filter(lambda module: isinstance(module, FfnBlock), state.model.modules()):
                block.register_forward_pre_hook(lambda _, inputs: self.dtypes.add(inputs[0].dtype))
        if event is Event.FIT_END:
            print(f"blocks read {self.dtypes} and ", end="")
            print(f"held at most {self.largest:.2f} of the weights")


if __name__ == "__main__":
    torch.distributed.reduce_scatter_tensor = averaging
    schema.has_gpu = lambda: True
    if "precision=amp_bf16" in sys.argv:
        policy = fsdp2.create_mixed_precision_policy
        fsdp2.create_mixed_precision_policy = lambda _, choice: policy(Precision.AMP_BF16, choice)
    if {"precision=amp_bf16", "precision=amp_fp16"} & {*sys.argv}:
        nn.LayerNorm.forward = norm_in_float32  # pyright: ignore[reportAttributeAccessIssue]: other names
    command_line.run(partial(train.main, callbacks=[HoldsItsShare()]))
