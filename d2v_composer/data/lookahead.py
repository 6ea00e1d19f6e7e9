"""Shards on their way before they are needed."""

import logging
import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from d2v_composer.data.shard_cache import Claim, ShardCache, ShardState

__all__ = ["Lookahead"]

TICK = 0.03
# For the threads of an epoch that ends. One that hangs goes on, as a daemon, and releases its shard by itself.
STOP_SECONDS = 5.0

log = logging.getLogger(__name__)


class Lookahead:
    """Fetch the shards that a process will need next, those first that it needs first, several at once.

    Its threads are daemons: a process that ends does not wait for one that waits for a store.

    Args:
        cache: Where the shards come, which says how many are fetched ahead on the machine.
        shard_of: The shard of a sample.
        sample_ids: (N,) the samples that the process will read, in this order.
        num_samples: How far to look beyond what was read.

    Attributes:
        num_read: How many of the samples were read; the reader counts them.
    """

    def __init__(
        self, cache: ShardCache, shard_of: Callable[[int], int], sample_ids: NDArray[np.int64], num_samples: int
    ) -> None:
        self.num_read = 0
        self._cache = cache
        self._shard_of = shard_of
        self._sample_ids = sample_ids
        self._num_samples = num_samples
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True)]

    def start(self) -> None:
        """Begin to fetch."""
        self._threads[0].start()

    def stop(self, wait: bool) -> None:
        """End fetching.

        Args:
            wait: For the threads to end, some seconds at most; not while the interpreter ends, when they never will.
        """
        self._stop.set()
        threads = list(self._threads) if wait else []
        for thread in threads:
            if thread is not threading.current_thread():  # which collects garbage, an abandoned epoch in it
                thread.join(STOP_SECONDS)

    def _run(self) -> None:
        for position, sample_id in enumerate(self._sample_ids):
            while position > self.num_read + self._num_samples and not self._stop.wait(TICK):
                pass
            try:
                self._fetch(self._shard_of(int(sample_id)), position)
            except Exception as error:  # noqa: BLE001
                log.debug("%s", error)  # the reader will meet the same fault, and raise it
            if self._stop.is_set():
                return

    def _fetch(self, shard_id: int, position: int) -> None:
        """Have a shard fetched once there is a place for it, unless its sample is read before."""
        claim = Claim.NO_PLACE
        while claim is Claim.NO_PLACE and position >= self.num_read and not self._stop.is_set():
            claim = self._cache.claim(shard_id, ahead=True)
            if claim is Claim.NO_PLACE:
                self._stop.wait(TICK)
        if not claim.is_ours:
            return
        thread = threading.Thread(target=self._fetch_claimed, args=(shard_id, claim), daemon=True)
        self._threads = [self._threads[0], *(each for each in self._threads[1:] if each.is_alive()), thread]
        try:
            thread.start()
        except RuntimeError:  # there cannot be more threads
            self._cache.release(shard_id, ShardState.REMOTE)
            raise

    def _fetch_claimed(self, shard_id: int, claim: Claim) -> None:
        try:
            self._cache.fetch(shard_id, claim, self._stop)
        except Exception as error:  # noqa: BLE001
            log.debug("%s", error)
