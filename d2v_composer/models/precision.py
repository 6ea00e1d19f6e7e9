"""Choose the precision in which a model computes on this machine, and compute in this precision."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Name → compute dtype of linear layers.
PRECISIONS = {"fp32": torch.float32, "amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}
# Largest difference of float32 outputs, relative to their norm: processors and runtimes round with smaller differences.
ROUNDING = 1e-4


class Precision(NamedTuple):
    dtype: torch.dtype
    """Dtype in which linear layers compute."""
    trainer: str
    """Precision of Composer's Trainer."""
    cpu_bf16: bool
    """True if the model must autocast to bfloat16 on a CPU, in place of the Trainer."""

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Dtype of autocast; ``None`` turns autocast off."""
        return None if self.dtype == torch.float32 else self.dtype


def is_equal_but_for_rounding(outputs: Tensor, expected: Tensor) -> bool:
    """Return True if ``outputs`` differ from ``expected`` by at most ``ROUNDING`` times the norm of ``expected``."""
    return bool((outputs - expected).norm() <= ROUNDING * expected.norm())  # false for NaN


def name_precision(choice: str) -> str:
    """Return the name of a precision, with ``auto`` replaced by this machine's choice.

    On a GPU, ``auto`` is amp_bf16 if the GPU has bfloat16 instructions, else amp_fp16. On a CPU, ``auto`` is amp_bf16
    if the CPU has AVX512-BF16 instructions, else fp32.
    """
    if choice != "auto":
        return choice
    if torch.cuda.is_available():
        return "amp_bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "amp_fp16"
    # A CPU emulates bfloat16 without such instructions: a matrix product took a hundred times as long as in float32.
    # Each x86 with AMX has AVX-512's, too; other architectures compute in float32.
    return "amp_bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def has_gpu() -> bool:
    return torch.cuda.is_available()


def check_precision(choice: str) -> None:
    """Raise ValueError if the precision needs a GPU and this machine has none."""
    if choice == "amp_fp16" and not has_gpu():
        raise ValueError("amp_fp16 needs a GPU, and this machine has none; on a CPU, set fp32, amp_bf16 or auto")


def choose_precision(choice: str) -> Precision:
    """Return the settings for computing in a precision on this machine."""
    name = name_precision(choice)
    cpu_bf16 = name == "amp_bf16" and not torch.cuda.is_available()
    return Precision(PRECISIONS[name], "fp32" if cpu_bf16 else name, cpu_bf16)


@contextmanager
def precision_of(dtype: torch.dtype | None, device: str) -> Iterator[None]:
    """Autocast to a dtype in the ``with`` block, without TF32; ``None``: no autocast."""
    switches: tuple[Any, ...] = torch.backends.cuda.matmul, torch.backends.cudnn
    allowed = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        with torch.autocast(device, dtype, enabled=dtype is not None):
            yield
    finally:
        for switch, is_allowed in zip(switches, allowed, strict=True):
            switch.allow_tf32 = is_allowed


def cpu_autocast(is_on: bool) -> AbstractContextManager[object]:
    """Return a context in which a CPU computes in bfloat16 if ``is_on``; otherwise, the context changes nothing."""
    # Not autocast(enabled=False), which would disable the caller's.
    return torch.autocast("cpu", torch.bfloat16) if is_on else nullcontext()
