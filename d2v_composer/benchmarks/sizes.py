"""Sizes of the benchmarks' models, in a module that imports little: the command line offers them."""

from typing import Any

__all__ = ["SIZES", "STUDENT_DEPTH"]

# Fields of Data2Vec2Config that are not its default.
SIZES: dict[str, dict[str, Any]] = {
    "base": {"prenet_depth": 2, "num_extra_tokens": 1, "depth": 10, "average_top_k_layers": 10},
    "large": {
        "embed_dim": 1024,
        "num_heads": 16,
        "prenet_depth": 0,
        "num_extra_tokens": 1,
        "depth": 24,
        "average_top_k_layers": 18,
    },
    "quickstart": {
        "embed_dim": 192,
        "num_heads": 6,
        "prenet_depth": 2,
        "num_extra_tokens": 1,
        "depth": 6,
        "average_top_k_layers": 6,
        "image_size": 32,
        "patch_size": 4,
    },
}
STUDENT_DEPTH = {"base": 5, "large": 5, "quickstart": 3}
