"""Compute in a given precision, even if the process allows TF32 or autocast."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def precision_of(dtype: torch.dtype | None, device: str) -> Iterator[None]:
    """Autocast to a dtype in the ``with`` block, or with ``None`` compute in float32.

    TF32 is off: it keeps 10 of 23 mantissa bits, and Composer allows it in matrix products, torch in convolutions.
    """
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
