"""The part of a model that checkpoints hold: what trains."""

from typing import Any

from torch import nn

from d2v_composer.models.encoder import Frozen
from d2v_composer.system.errors import InputError


def frozen_prefixes(module: nn.Module, prefix: str = "") -> tuple[str, ...]:
    """Return the prefixes of the names of tensors in a module's frozen parts."""
    parts = module.named_modules(prefix=prefix, remove_duplicate=False)
    return tuple(f"{name}." for name, part in parts if isinstance(part, Frozen) and part.is_frozen)


def keep_trained_tensors(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """Remove the tensors of frozen parts from a state dict."""
    frozen = frozen_prefixes(module, prefix.removesuffix("."))
    for name in [name for name in state_dict if name.startswith(frozen)]:
        del state_dict[name]


def check_tensors(module: nn.Module, state_dict: dict, prefix: str, *args: Any) -> None:
    """Check that a state dict has exactly a module's tensors, because Composer may load without ``strict``.

    Raises:
        InputError: A tensor is missing, unknown or misshapen.
    """
    found, expected = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith(prefix)}
        for tensors in (state_dict, module.state_dict(prefix=prefix))
    )
    if different := sorted(found.items() ^ expected.items()):
        name, _ = different[0]
        shapes = [each.get(name, "none") for each in (found, expected)]
        raise InputError(f"tensor {name}: checkpoint has {shapes[0]}, model has {shapes[1]}")


def expect_no_frozen_tensors(module: nn.Module, incompatible_keys: Any) -> None:
    """Let strict loading accept a state dict without the frozen parts."""
    incompatible_keys.missing_keys.clear()
