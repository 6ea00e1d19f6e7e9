"""Training images from MDS shards, local or in an object store, without labels."""

from pathlib import Path
from typing import Any

from PIL import Image
from typing_extensions import override

from d2v_composer.data.augmentation import RandomResizedCropFlip, sample_rng
from d2v_composer.data.decode import rgb_of
from d2v_composer.data.mds_index import keep_encoded
from d2v_composer.data.verified_dataset import READ_ATTEMPTS, VerifiedDataset

__all__ = ["StreamingImages"]


class StreamingImages(VerifiedDataset):
    """Augmented images from a column of an MDS data set.

    A sample is ``{"image": (3, S, S) uint8, "sample_id": int}``; other columns, a label for one, are not passed on.
    Its augmentation depends on (seed, epoch, sample id) alone, and with ``num_canonical_nodes`` given so does the
    order: both are the same for any number of ranks and workers and after any resume. An epoch has every sample once,
    or raises: see :class:`VerifiedDataset`.

    Args:
        local: The data set, or where the shards of a remote one are kept: for one run at a time, and in it for the
            data set made last.
        remote: Its address in an object store, or ``None``.
        batch_size: Of one device.
        transform: The augmentation.
        column: Holds the images: files (encoded as ``bytes``, ``jpeg`` or ``png``), or pixels (``pil``).
        seed: Of the order and of the augmentation.
        shuffle: Whether the order is random, another in every epoch.
        num_canonical_nodes: Into how many equal parts the order is cut; nodes must divide it or be its multiple. An
            epoch that it does not divide repeats a few samples.
        shuffle_block_size: How many samples are mixed with each other. The shards of as many are in use at a time.
        epoch_size: How many of the samples make an epoch, drawn anew for each; default all.
        cache_limit: What ``local`` may hold of a remote data set, in bytes or as '100gb'; default all.
        timeout: How long an unreachable store is tried again, in seconds.
        predownload: How many samples of each worker are looked ahead for shards to fetch.

    Raises:
        InputError: Another run uses ``local`` for a remote data set.
        ValueError: ``cache_limit`` is too small, or there is one for what is not a cache.
    """

    def __init__(
        self,
        *,
        local: str | Path,
        remote: str | None = None,
        batch_size: int,
        transform: RandomResizedCropFlip,
        column: str = "image",
        seed: int,
        shuffle: bool = True,
        num_canonical_nodes: int = 1,
        shuffle_block_size: int = 1 << 16,
        epoch_size: int | None = None,
        cache_limit: int | str | None = None,
        timeout: float = 600.0,
        predownload: int = 1024,
    ) -> None:
        super().__init__(
            local=local,
            remote=remote,
            timeout=timeout,
            cache_limit=cache_limit,
            shuffle_block_size=shuffle_block_size,
            batch_size=batch_size,
            shuffle=shuffle,
            shuffle_seed=seed,
            # Not the defaults: those depend on the number of nodes, and a resume on another number would see
            # another order.
            shuffle_algo="py1e",
            num_canonical_nodes=num_canonical_nodes,
            epoch_size=epoch_size,
            predownload=max(predownload, batch_size),
        )
        keep_encoded(self.shards, column)
        self.column = column
        self.transform = transform
        self.seed = seed

    @override
    def get_item(self, sample_id: int, retry: int = READ_ATTEMPTS) -> dict[str, Any]:
        """One augmented sample of the present epoch.

        Raises:
            ShardError: Its shard cannot be had.
            InputError: It is no image that can be read.
        """
        source = f"sample {sample_id} of {self.folder}"
        stored = super().get_item(sample_id, retry)[self.column]
        image = rgb_of(stored, source) if isinstance(stored, Image.Image) else stored
        pixels = self.transform(image, sample_rng(self.seed, self.epoch, int(sample_id)), source)
        return {"image": pixels, "sample_id": int(sample_id)}
