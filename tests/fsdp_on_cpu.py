"""recipes/train.py with FSDP between processes on a CPU, which we refuse: ``fsdp_on_cpu.py RUN's arguments``.

torch 2.7's gloo adds up what it is told to average when it reduces and scatters; here it averages.
"""

import sys
from pathlib import Path
from typing import Any

import torch.distributed
from torch import Tensor
from torch.distributed import ReduceOp

sys.path.insert(0, str(Path(__file__).parent.parent))
from d2v_composer import cli, config
from recipes import train

reduce_scatter = torch.distributed.reduce_scatter_tensor


def averaging(output: Tensor, input: Tensor, op: Any = ReduceOp.SUM, **options: Any) -> Any:
    done = reduce_scatter(output, input, op=ReduceOp.SUM, **options)
    if op == ReduceOp.AVG:
        output.div_(torch.distributed.get_world_size())
    return done


if __name__ == "__main__":
    torch.distributed.reduce_scatter_tensor = averaging
    config._parallelism = lambda config: iter(())
    cli.run(train.main)
