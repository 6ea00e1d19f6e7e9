"""Run recipes/ray_embed.py with an embedder that takes its time and leaves a file named as the node where it works.

usage: slow_ray_embed.py FOLDER [arguments of ray_embed.py]
"""

import sys
import time
from pathlib import Path
from typing import Any

import ray  # pyright: ignore[reportMissingImports]  (an extra)

from d2v_composer import Embedder
from recipes import ray_embed

folder = Path(sys.argv[1])


class Slow(Embedder):
    def __call__(self, batch: Any) -> Any:
        embedded = super().__call__(batch)
        (folder / ray.util.get_node_ip_address()).touch()
        time.sleep(1)
        return embedded


if __name__ == "__main__":
    ray_embed.Embedder = Slow
    ray_embed.main(*sys.argv[2:])
