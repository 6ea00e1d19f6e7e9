"""The meaning of ``precision`` on this machine."""

from typing import NamedTuple

import torch

__all__ = ["Precision", "choose_precision"]

DTYPES = {"fp32": torch.float32, "amp_fp16": torch.float16, "amp_bf16": torch.bfloat16}


class Precision(NamedTuple):
    dtype: torch.dtype
    """Compute dtype of linear layers."""
    trainer: str
    """Precision of Composer's Trainer."""
    cpu_bf16: bool
    """The model autocasts to bfloat16: on a CPU the Trainer refuses amp_bf16."""


def choose_precision(name: str) -> Precision:
    """Return how to compute with a config's ``precision`` on this machine."""
    cpu_bf16 = name == "amp_bf16" and not torch.cuda.is_available()
    return Precision(DTYPES[name], "fp32" if cpu_bf16 else name, cpu_bf16)
