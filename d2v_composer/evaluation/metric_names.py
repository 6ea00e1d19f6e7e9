"""Names of retrieval metrics, and the embeddings they are of."""

from collections.abc import Callable

from torch import Tensor

__all__ = ["BANKS", "Embed", "headline_fallbacks", "metric_key"]

Embed = Callable[[Tensor], Tensor | dict[str, Tensor]]
"""(B, 3, height, width) uint8 images, on the model's device → (B, D), or several such by name."""

BANKS = ("train", "test")


def metric_key(dataset: str, bank: str, k: int, embedding: str | None = None, reference: str | None = None) -> str:
    """The name under which an accuracy is logged; without ``embedding``, the headline's."""
    parts = ["metrics", dataset, reference, f"bank_{bank}", f"top{k}", embedding]
    return "/".join(part for part in parts if part is not None)


def headline_fallbacks(headline: str) -> list[str]:
    """An embedding, and which one to compare with it of what has no such: the bare encoder has no layers to average."""
    return list(dict.fromkeys([headline, headline.replace("layer_mean", "output")]))
