"""The meaning of a precision's name: fp32, amp_fp16, amp_bf16 or auto."""

from typing import NamedTuple

import torch

__all__ = ["PRECISIONS", "Precision", "choose_precision", "name_precision"]

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


def name_precision(choice: str, on_gpu: bool | None = None) -> str:
    """Return a choice's precision: ``auto`` is the fastest for which a GPU or a CPU has instructions."""
    if choice != "auto":
        return choice
    if torch.cuda.is_available() if on_gpu is None else on_gpu:
        return "amp_bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "amp_fp16"
    # A CPU emulates bfloat16 without such instructions: a matrix product took a hundred times as long as in float32.
    # Each x86 with AMX has AVX-512's, too; other architectures compute in float32.
    return "amp_bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def choose_precision(choice: str, on_gpu: bool | None = None) -> Precision:
    """Return how to compute with a precision on a GPU or a CPU; default: on this machine's GPU, if it has one."""
    on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    name = name_precision(choice, on_gpu)
    cpu_bf16 = name == "amp_bf16" and not on_gpu
    return Precision(PRECISIONS[name], "fp32" if cpu_bf16 else name, cpu_bf16)
