"""Share work among the ranks of a run.

Shapes: N images, W ranks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ONE_RANK", "Ranks"]


class Ranks(NamedTuple):
    """This process among those that share an evaluation."""

    rank: int = 0
    world_size: int = 1

    def share(self, num_images: int) -> Tensor:
        """Return the indices of this rank: every W-th, padded so that all ranks have equally many."""
        mine = torch.arange(num_images)[self.rank :: self.world_size]
        missing = -(-num_images // self.world_size) - len(mine)
        return torch.cat([mine, mine.new_zeros(missing)])

    def take_share(self, images: Tensor) -> Tensor:
        """Return the rows of this rank's images."""
        return images if self.world_size == 1 else images[self.share(len(images)).to(images.device)]

    def gather(self, share: Tensor, num_images: int) -> Tensor:
        """Return the shares of all ranks in the order of the images, (N, …)."""
        if self.world_size == 1:
            return share[:num_images]
        return self._all_gather(share).transpose(0, 1).flatten(0, 1)[:num_images]

    def _all_gather(self, share: Tensor) -> Tensor:
        """Return all shares, which have one shape: (W, …)."""
        shares = share.new_empty(self.world_size, *share.shape)
        if not share.is_cpu:
            torch.distributed.all_gather_into_tensor(shares.flatten(0, 1), share.contiguous())
            return shares
        # gloo's all_gather copies in its own threads, each of which starts a pool of OpenMP threads. Once there are
        # more of them than cores, they sleep at every barrier, and every later operation takes longer.
        shares[self.rank] = share
        for rank, received in enumerate(shares):
            torch.distributed.broadcast(received, src=rank)
        return shares


ONE_RANK = Ranks()
