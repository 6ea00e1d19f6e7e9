"""The nodes of a preflight: one process of each talks to the others, without any device."""

import os
from datetime import timedelta
from typing import NamedTuple

from torch.distributed import TCPStore
from typing_extensions import Self

__all__ = ["Nodes"]

# The slowest node may still fetch the teacher or CIFAR.
PATIENCE = timedelta(hours=1)


class Nodes(NamedTuple):
    """This node among those of the run.

    A store of torch's rather than a process group: the preflight itself must not hold the devices that it rehearses.
    """

    rank: int
    count: int
    ranks_per_node: int
    store: TCPStore | None
    """``None`` for one node."""

    @classmethod
    def from_environment(cls) -> Self:
        """As Composer's launcher describes them; one node of one rank without it."""
        ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        count = int(os.environ.get("WORLD_SIZE", "1")) // ranks_per_node
        rank = int(os.environ.get("NODE_RANK", "0"))
        if count == 1:
            return cls(0, 1, ranks_per_node, None)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return cls(rank, count, ranks_per_node, TCPStore(address, port, count, is_master=rank == 0, timeout=PATIENCE))

    def exchange(self, key: str, text: str) -> list[str]:
        """Give the other nodes a text, and wait for theirs.

        Args:
            key: Used once in a preflight.
            text: This node's.

        Returns:
            Every node's, in their order.
        """
        if self.store is None:
            return [text]
        self.store.set(f"{key}/{self.rank}", text)
        return [self.store.get(f"{key}/{rank}").decode() for rank in range(self.count)]
