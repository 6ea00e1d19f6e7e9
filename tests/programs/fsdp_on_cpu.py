"""recipes/train.py with FSDP between processes on a CPU, which it refuses: ``fsdp_on_cpu.py RUN's arguments``.

torch 2.7's gloo adds instead of averaging when it reduces and scatters; here it averages. The weights that each rank
holds are checked throughout the run.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed
from composer import Callback, Event, Logger, State
from torch import Tensor
from torch.distributed import ReduceOp

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
from sharded_state import gathered_bytes, gathered_units, share

import small_vits  # noqa: F401  (they are registered in timm)
from d2v_composer.config import schema
from d2v_composer.system import command_line
from recipes import train

reduce_scatter = torch.distributed.reduce_scatter_tensor


def averaging(output: Tensor, input: Tensor, op: Any = ReduceOp.SUM, **options: Any) -> Any:
    done = reduce_scatter(output, input, op=ReduceOp.SUM, **options)
    if op == ReduceOp.AVG:
        output.div_(torch.distributed.get_world_size())
    return done


class HoldsItsShare(Callback):
    """Refuse that a rank holds more than its share of the weights after a forward or backward pass or a retrieval."""

    looked_at = (Event.FIT_START, Event.AFTER_FORWARD, Event.AFTER_BACKWARD, Event.BATCH_END)

    def __init__(self) -> None:
        self.largest = 0.0

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event in self.looked_at:
            gathered = gathered_units(state.model), gathered_bytes(state.model)
            assert gathered == (set(), 0), f"{event}: {gathered}"
            self.largest = max(self.largest, share(state.model))
        if event is Event.FIT_END:
            print(f"held at most {self.largest:.2f} of the weights")


if __name__ == "__main__":
    torch.distributed.reduce_scatter_tensor = averaging
    schema.has_gpu = lambda: True
    command_line.run(partial(train.main, callbacks=[HoldsItsShare()]))
