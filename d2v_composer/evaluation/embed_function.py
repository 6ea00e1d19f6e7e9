"""The type of a function that embeds images."""

from collections.abc import Callable

from torch import Tensor

__all__ = ["Embed"]

Embed = Callable[[Tensor], Tensor | dict[str, Tensor]]
"""(B, 3, height, width) uint8 images on the model's device → (B, D), or several embeddings by name."""
