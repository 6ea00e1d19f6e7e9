"""A second device for machines without a GPU: torch_xla's CPU, and a mode that refuses to mix it with the host.

tests/README.md describes the installation, in a separate folder, because Composer imports torch_xla if it can.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from composer.devices import DeviceCPU
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

__all__ = ["MixedDevicesError", "OneDevice", "SecondDevice", "second_device"]

# Functions that move tensors between devices.
MOVES = {
    "__deepcopy__",
    "__set__",  # .grad, .data
    "_has_compatible_shallow_copy_type",
    "copy_",
    "cpu",
    "swap_tensors",
    "to",
}


class MixedDevicesError(RuntimeError):
    """An operation mixed tensors of host and device, which a GPU refuses."""


class OneDevice(TorchFunctionMode):
    """Refuse operations that mix devices, some of which XLA computes. Host scalars are allowed.

    Not a TorchDispatchMode, which changes XLA's results.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [each for each in tree_leaves((args, kwargs or {})) if isinstance(each, Tensor)]
        devices = {each.device.type for each in tensors if each.ndim or each.device.type != "cpu"}
        name = getattr(func, "__name__", str(func))
        if len(devices) > 1 and name not in MOVES:
            raise MixedDevicesError(f"{name} of {', '.join(f'{each.device} {tuple(each.shape)}' for each in tensors)}")
        return func(*args, **(kwargs or {}))


class SecondDevice(DeviceCPU):
    """torch_xla's CPU, treated by Composer's Trainer like a GPU: it moves the model and each microbatch."""

    name = "xla"

    def __init__(self) -> None:
        import torch_xla.core.xla_model as xm  # pyright: ignore[reportMissingImports]

        self._device = xm.xla_device()

    def module_to_device(self, module: Any) -> Any:
        # In place, as on a GPU: the optimizer already holds the parameters.
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return module.to(self._device)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    def tensor_to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device)


def no_inference_mode(mode: bool = True) -> Any:
    return torch.no_grad() if mode else nullcontext()


@contextmanager
def second_device() -> Iterator[SecondDevice]:
    """Provide the device, with replacements for features that XLA lacks."""
    import torch_xla  # pyright: ignore[reportMissingImports]

    torch_xla.experimental.eager_mode(True)  # one graph of a whole evaluation takes minutes and gigabytes
    with pytest.MonkeyPatch.context() as patch:
        # XLA makes no views of inference tensors.
        patch.setattr(torch, "inference_mode", no_inference_mode)
        # It has no fused AdamW.
        patch.setattr(torch.optim, "AdamW", partial(without_fused, torch.optim.AdamW))
        with OneDevice():
            yield SecondDevice()


def without_fused(optimizer: type[torch.optim.Optimizer], *args: Any, fused: Any = None, **options: Any) -> Any:
    return optimizer(*args, **options)
