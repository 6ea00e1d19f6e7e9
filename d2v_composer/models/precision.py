"""The meaning of a precision's name: fp32, amp_fp16 or amp_bf16."""

from typing import NamedTuple

import torch

__all__ = ["PRECISIONS", "Precision", "choose_precision"]

# Name → compute dtype of linear layers.
PRECISIONS = {"fp32": torch.float32, "amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


class Precision(NamedTuple):
    dtype: torch.dtype
    """Compute dtype of linear layers."""
    trainer: str
    """Precision of Composer's Trainer."""
    cpu_bf16: bool
    """The model autocasts to bfloat16: on a CPU the Trainer refuses amp_bf16."""

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype of autocast; ``None``: no autocast."""
        return None if self.dtype == torch.float32 else self.dtype


def choose_precision(name: str, on_gpu: bool | None = None) -> Precision:
    """Return how to compute with a named precision on a GPU or a CPU; default: on this machine's GPU, if it has one."""
    cpu_bf16 = name == "amp_bf16" and not (torch.cuda.is_available() if on_gpu is None else on_gpu)
    return Precision(PRECISIONS[name], "fp32" if cpu_bf16 else name, cpu_bf16)
