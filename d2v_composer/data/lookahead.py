"""Fetch shards before they are needed."""

import logging
import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from d2v_composer.data.shard_cache import Claim, ShardCache

__all__ = ["Lookahead"]

TICK = 0.03
# How long the end of an epoch waits for each thread. One that hangs releases its shard later, as a daemon.
STOP_SECONDS = 5.0

log = logging.getLogger(__name__)


class Lookahead:
    """Fetch the shards that a process will need next, several at once, in the order in which it needs them.

    The threads are daemons, so that a process can end while one of them waits for a store.

    Args:
        cache: The shards' cache, which limits how many of them a machine fetches ahead.
        shard_of: Returns the shard of a sample.
        sample_ids: (N,) the samples that the process will read, in this order.
        num_samples: How many samples to look ahead of the reader.

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
        self._walker = threading.Thread(target=self._walk, daemon=True)
        self._fetchers: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to fetch."""
        self._walker.start()

    def stop(self, wait: bool) -> None:
        """End fetching.

        Args:
            wait: Wait some seconds for the threads to end; not while the interpreter ends, when they never do.
        """
        self._stop.set()
        if wait:
            _join(self._walker)  # first: it starts the others
            for thread in self._fetchers:
                _join(thread)

    def _walk(self) -> None:
        for position, sample_id in enumerate(self._sample_ids):
            while position > self.num_read + self._num_samples and not self._stop.wait(TICK):
                pass
            if self._stop.is_set():
                return
            try:
                self._fetch_ahead(self._shard_of(int(sample_id)), position)
            except Exception as error:  # noqa: BLE001
                log.debug("%s", error)  # the reader will meet the same error, and raise it

    def _fetch_ahead(self, shard_id: int, position: int) -> None:
        """Start a thread that fetches a shard, once that is granted, unless its sample is read before."""
        while position >= self.num_read and not self._stop.is_set():
            claim = self._cache.claim(shard_id, ahead=True)
            if claim is Claim.FETCH:
                self._start_fetcher(shard_id)
            if claim is not Claim.WAIT:
                return
            self._stop.wait(TICK)

    def _start_fetcher(self, shard_id: int) -> None:
        thread = threading.Thread(target=self._fetch, args=(shard_id,), daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads can be started
            self._cache.release(shard_id)
            raise
        self._fetchers = [*(each for each in self._fetchers if each.is_alive()), thread]

    def _fetch(self, shard_id: int) -> None:
        try:
            self._cache.fetch(shard_id, self._stop)
        except Exception as error:  # noqa: BLE001
            log.debug("%s", error)


def _join(thread: threading.Thread) -> None:
    if thread is not threading.current_thread():  # garbage collection in one of the threads may end an epoch
        thread.join(STOP_SECONDS)
