"""Training images from MDS shards, local or in an object store, without labels."""

import logging
import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from composer.utils import dist
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image
from streaming import StreamingDataset
from streaming.base.dataset import _ShardState as ShardState
from typing_extensions import override

from d2v_composer.data.transforms import RandomResizedCropFlip, sample_rng
from d2v_composer.data.verified_stream import ShardError, VerifiedStream
from d2v_composer.errors import InputError
from d2v_composer.locks import acquire

__all__ = ["StreamingImages"]

TICK = 0.007
# The workers of a run that was just killed see it within five seconds, and end.
LAST_USER_LEAVES = 15.0
# A shard may be evicted between being fetched and being read.
READ_ATTEMPTS = 8

log = logging.getLogger(__name__)


class StreamingImages(StreamingDataset):
    """Augmented images of an MDS data set with a column ``image`` (an image file's bytes).

    A sample is ``{"image": (3, S, S) uint8, "sample_id": int}``; other columns, a label for one, are not passed on.
    Its augmentation depends on (seed, epoch, sample id) alone, and with ``num_canonical_nodes`` given so does the
    order: both are the same for any number of ranks and workers and after any resume.

    An epoch has every sample once, or raises. Streaming's own order, resumption and bookkeeping are used; fetching is
    not, since there a shard that cannot be had ends the epoch early, or hangs, and a damaged one stays in the cache.
    Here each shard is verified before its first use in a run (see :class:`VerifiedStream`), once a machine; the first
    process that gives a shard up leaves word, so that the others try but once more.

    Args:
        local: The data set, or where the shards of a remote one are kept: for one run at a time.
        remote: Its address in an object store, or ``None``.
        batch_size: Of one device.
        transform: The augmentation.
        seed: Of the order and of the augmentation.
        shuffle: Whether the order is random, another in every epoch.
        num_canonical_nodes: Into how many equal parts the order is cut; nodes must divide it or be its multiple.
        shuffle_block_size: How many samples are mixed with each other. The shards of as many are in use at a time.
        epoch_size: How many of the samples make an epoch, drawn anew for each; default all.
        cache_limit: What ``local`` may hold of a remote data set, in bytes or as '100gb'; default all.
        timeout: How long an unreachable store is tried again, in seconds.
        predownload: How many samples of each worker are looked ahead for shards to fetch.

    Raises:
        InputError: Another run uses ``local`` for a remote data set.
    """

    def __init__(
        self,
        *,
        local: str | Path,
        remote: str | None = None,
        batch_size: int,
        transform: RandomResizedCropFlip,
        seed: int,
        shuffle: bool = True,
        num_canonical_nodes: int = 1,
        shuffle_block_size: int = 1 << 16,
        epoch_size: int | None = None,
        cache_limit: int | str | None = None,
        timeout: float = 600.0,
        predownload: int = 1024,
    ) -> None:
        self.folder = str(local)
        if remote is not None and dist.get_local_rank() == 0:
            self._occupy(Path(local))
        self.stream = VerifiedStream(local=local, remote=remote, timeout=timeout)
        super().__init__(
            streams=[self.stream],
            batch_size=batch_size,
            shuffle=shuffle,
            shuffle_seed=seed,
            # Not the defaults: those depend on the number of nodes, and a resume on another number would see
            # another order.
            shuffle_algo="py1e",
            num_canonical_nodes=num_canonical_nodes,
            shuffle_block_size=shuffle_block_size,
            epoch_size=epoch_size,
            cache_limit=cache_limit,
            predownload=max(predownload, batch_size),
        )
        self.transform = transform
        self.seed = seed
        self.epoch = 0
        # Shards that an earlier run left take space, but are as good as remote until they are verified.
        self._unverified = [i for i, shard in enumerate(self.shards) if self.stream.bytes_here(shard)]
        if dist.get_local_rank() == 0:
            for shard_id in self._unverified:
                self._shard_states[shard_id] = ShardState.REMOTE
            self._warn_of_thrashing(shuffle_block_size)

    def _warn_of_thrashing(self, shuffle_block_size: int) -> None:
        samples = min(round(1.25 * shuffle_block_size), self.num_samples) if self.shuffle else 0
        needed = sum(shard.get_raw_size() for shard in self.shards) * samples // self.num_samples
        if isinstance(self.cache_limit, int) and 0 < self.cache_limit < needed:
            log.warning(
                "%s: cache_limit %d is less than what is mixed at a time, about %d bytes: shards will be fetched more "
                "than once an epoch; a smaller shuffle_block_size helps",
                self.folder,
                self.cache_limit,
                needed,
            )

    def _occupy(self, local: Path) -> None:
        descriptor = acquire(local / ".in_use", wait=LAST_USER_LEAVES)
        if descriptor is None:
            raise InputError(f"{local}: another run keeps its shards there: give each a train_loader.local of its own")
        weakref.finalize(self, os.close, descriptor)

    @override
    def __iter__(self) -> Iterator[dict[str, Any]]:
        """This worker's samples of the next epoch, or of the rest of one that is resumed.

        Raises:
            ShardError: A shard cannot be had.
            InputError: A sample is no image that can be read.
        """
        self._unique_worker_world = self._unique_rank_world.detect_workers()
        self._parallel_worker_world = self._parallel_rank_world.detect_workers()
        self.epoch, sample_in_epoch = self._resume_incr_epoch()
        sample_ids = self._get_work(self.epoch, sample_in_epoch)
        sample_ids = sample_ids[sample_ids != -1]  # padding, where the parts are not equal

        assert self.predownload is not None  # see __init__
        ahead = Lookahead(sample_ids, self.predownload)
        # A daemon: a process that ends must not wait for one that waits for a store.
        threading.Thread(target=self._fetch_ahead, args=(ahead,), daemon=True).start()
        try:
            for sample_id in sample_ids:
                yield self[int(sample_id)]
                ahead.num_read += 1
        finally:
            ahead.stop.set()

    def _fetch_ahead(self, ahead: "Lookahead") -> None:
        for shard_id in ahead.shards(self):
            try:
                self.prepare_shard(shard_id, blocking=False)
            except Exception:  # noqa: BLE001
                return  # who reads the shard will meet the same fault, and raise it

    @override
    def get_item(self, sample_id: int, retry: int = READ_ATTEMPTS) -> dict[str, Any]:
        """One augmented sample of the present epoch.

        Raises:
            ShardError: Its shard cannot be had.
            InputError: It is no image that can be read.
        """
        source = f"sample {sample_id} of {self.folder}"
        stored = self._stored(sample_id, retry)["image"]
        image = stored.convert("RGB") if isinstance(stored, Image.Image) else stored
        pixels = self.transform(image, sample_rng(self.seed, self.epoch, int(sample_id)), source)
        return {"image": pixels, "sample_id": int(sample_id)}

    def _stored(self, sample_id: int, attempts: int) -> dict[str, Any]:
        shard_id, sample_in_shard = self.spanner[sample_id]
        for _ in range(attempts):
            if self._shard_states[shard_id] != ShardState.LOCAL:
                self.prepare_shard(shard_id)
            try:
                sample = self.shards[shard_id][sample_in_shard]
            except FileNotFoundError:
                self._note_loss(shard_id)
                continue
            self._shard_access_times[shard_id] = time.time_ns()
            return sample
        raise ShardError(
            f"{self.folder}: shard {shard_id} was evicted {attempts} times before sample {sample_id} could be read: "
            f"cache_limit {self.cache_limit} is too small"
        )

    @override
    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetch and verify a shard, unless another process of this machine does.

        Args:
            shard_id: Which.
            blocking: Whether to wait for that process, and for room in the cache.

        Raises:
            ShardError: It cannot be had.
        """
        # Longer than anybody tries: who was to fetch it must be dead, or all room taken by what others fetch.
        deadline = time.monotonic() + 2 * self.stream.timeout + 60
        while (before := self._claim(shard_id)) is None:
            if not blocking or self._shard_states[shard_id] == ShardState.LOCAL:
                return
            if time.monotonic() > deadline:
                raise ShardError(f"{self.folder}: another process did not finish fetching shard {shard_id}")
            time.sleep(TICK)
        # Where another gave it up, its patience is not spent twice.
        timeout = 0 if before == ShardState.INVALID else None
        state = ShardState.INVALID
        try:
            self.stream.fetch_shard(self.shards[shard_id], timeout)
            state = ShardState.LOCAL
        finally:
            self._release(shard_id, state)

    def _claim(self, shard_id: int) -> int | None:
        """Make a shard that is not here this process's to fetch, with room for it; what its state was before."""
        if self._shard_states[shard_id] in (ShardState.LOCAL, ShardState.PREPARING):
            return None
        with self._cache_lock():
            state = int(self._shard_states[shard_id])
            if state in (ShardState.LOCAL, ShardState.PREPARING) or not self._make_room(shard_id):
                return None
            shard = self.shards[shard_id]
            self.cache_usage += shard.get_max_size() - self.stream.bytes_here(shard)
            self._shard_states[shard_id] = ShardState.PREPARING
            return state

    def _release(self, shard_id: int, state: ShardState) -> None:
        with self._cache_lock():
            shard = self.shards[shard_id]
            self.cache_usage += self.stream.bytes_here(shard) - shard.get_max_size()
            self._shard_access_times[shard_id] = time.time_ns()
            self._shard_states[shard_id] = state

    def _note_loss(self, shard_id: int) -> None:
        """A shard that is said to be here is not: somebody deleted it."""
        with self._cache_lock():
            shard = self.shards[shard_id]
            if self._shard_states[shard_id] == ShardState.LOCAL and not self.stream.bytes_here(shard):
                self.cache_usage -= shard.get_persistent_size(self.stream.keep_zip)
                self._shard_states[shard_id] = ShardState.REMOTE

    def _make_room(self, shard_id: int) -> bool:
        """Evict shards until there is room for this one; ``False``: what is left is being fetched just now."""
        if not self.cache_limit:
            return True
        assert isinstance(self.cache_limit, int)
        needed = self.shards[shard_id].get_max_size() - self.stream.bytes_here(self.shards[shard_id])
        while self.cache_usage + needed > self.cache_limit:
            coldest = self._coldest_shard(shard_id)
            if coldest is None:
                return False
            self._evict_shard(coldest)
        return True

    def _coldest_shard(self, wanted: int) -> int | None:
        """What is best evicted: a shard that nobody has used in this run, or the one whose last use is longest ago."""
        while self._unverified:
            shard_id = self._unverified.pop()
            remote = self._shard_states[shard_id] == ShardState.REMOTE
            if remote and shard_id != wanted and self.stream.bytes_here(self.shards[shard_id]):
                return shard_id
        here = np.flatnonzero(self._shard_states.numpy() == ShardState.LOCAL)
        if not len(here):
            return None
        return int(here[np.argmin(self._shard_access_times.numpy()[here])])

    @contextmanager
    def _cache_lock(self) -> Iterator[None]:
        # Made where it is used: a lock cannot be pickled into a worker.
        if not hasattr(self, "_cache_filelock"):
            self._cache_filelock = FileLock(self._cache_filelock_path)
        with self._cache_filelock:
            yield


class Lookahead:
    """Which shards a worker will need next, as far as it may look.

    Args:
        sample_ids: (N,) what it will read, in this order.
        num_samples: How far it looks beyond what it has read.
    """

    def __init__(self, sample_ids: NDArray[np.int64], num_samples: int) -> None:
        self.sample_ids = sample_ids
        self.num_samples = num_samples
        self.num_read = 0
        self.stop = threading.Event()

    def shards(self, dataset: StreamingDataset) -> Iterator[int]:
        """The shard of each sample, once it is near enough, until :attr:`stop` is set."""
        for i, sample_id in enumerate(self.sample_ids):
            while i > self.num_read + self.num_samples and not self.stop.wait(TICK):
                pass
            if self.stop.is_set():
                return
            yield dataset.spanner[int(sample_id)][0]
