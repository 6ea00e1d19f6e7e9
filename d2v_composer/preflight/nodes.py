"""Exchange texts between the nodes of a preflight, one process each, without any device."""

import os
from dataclasses import dataclass
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore  # torch.distributed's, which pyright does not see there
from typing_extensions import Self

__all__ = ["Nodes"]

# The slowest node may still be fetching the teacher or CIFAR.
PATIENCE = timedelta(hours=1)


@dataclass(frozen=True)
class Nodes:
    """This node and the others of the run.

    They share a store of torch, not a process group: the preflight must not hold the devices that the rehearsal needs.
    """

    rank: int
    num_nodes: int
    ranks_per_node: int
    store: TCPStore | None
    """``None`` for one node."""

    @classmethod
    def from_environment(cls) -> Self:
        """Read the variables of Composer's launcher; one node of one rank without it."""
        ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        num_nodes = int(os.environ.get("WORLD_SIZE", "1")) // ranks_per_node
        rank = int(os.environ.get("NODE_RANK", "0"))
        if num_nodes == 1:
            return cls(0, 1, ranks_per_node, None)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return cls(
            rank, num_nodes, ranks_per_node, TCPStore(address, port, num_nodes, is_master=rank == 0, timeout=PATIENCE)
        )

    def exchange(self, key: str, text: str) -> list[str]:
        """Send a text to the other nodes, wait for theirs, and return all in the order of the nodes.

        Args:
            key: A name, used once in a preflight.
            text: This node's text.
        """
        if self.store is None:
            return [text]
        self.store.set(f"{key}/{self.rank}", text)
        return [self.store.get(f"{key}/{rank}").decode() for rank in range(self.num_nodes)]

    def leave(self) -> None:
        """Leave the exchange. Node 0, which holds the store, waits for the others."""
        if self.store is None:
            return
        self.store.set(f"left/{self.rank}", "")
        if self.rank == 0:
            self.store.wait([f"left/{rank}" for rank in range(self.num_nodes)])
