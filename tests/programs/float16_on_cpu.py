"""A program in amp_fp16 on a CPU, as on a GPU: ``float16_on_cpu.py PROGRAM.py ARGUMENTS``.

Composer refuses float16 there. Here it casts by autocast, scales the loss by torch's GradScaler, and steps without a
closure, the path of the default precision on GPUs. In batch 3 a gradient overflows.
"""

import importlib
import math
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from composer import Callback, Logger, State, Trainer
from composer.core import precision
from composer.utils import dist
from torch.amp.grad_scaler import GradScaler
from torch.distributed.tensor import DTensor

from d2v_composer.config import schema


def allow_float16(patch: Callable[[Any, str, Any], None] = setattr, **scaler: float) -> None:
    """Let Composer train in amp_fp16 on a CPU, with the arguments of a GradScaler."""
    trainer = importlib.import_module("composer.trainer.trainer")
    autocast = SimpleNamespace(
        cuda=torch.cuda, float16=torch.float16, autocast=lambda _, dtype: torch.autocast("cpu", dtype)
    )
    patch(schema, "has_gpu", lambda: True)
    patch(precision, "DeviceCPU", ())  # no device is one that refuses
    patch(precision, "is_xla_installed", lambda: True)
    patch(precision, "torch", autocast)
    patch(trainer, "GradScaler", partial(GradScaler, "cpu", **scaler))


class Overflow(Callback):
    """In batch 3, let a gradient overflow in the last rank's share."""

    def after_backward(self, state: State, logger: Logger) -> None:
        gradient = state.optimizers[0].param_groups[0]["params"][0].grad
        is_last = dist.get_global_rank() == dist.get_world_size() - 1
        if gradient is not None and is_last and state.timestamp.batch == 3:
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).fill_(math.inf)


initialize = Trainer.__init__


def initialize_with_overflow(self: Trainer, *args: Any, callbacks: Any = (), **options: Any) -> None:
    initialize(self, *args, callbacks=[*callbacks, Overflow()], **options)


if __name__ == "__main__":
    allow_float16()
    Trainer.__init__ = initialize_with_overflow
    sys.argv.pop(0)
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
