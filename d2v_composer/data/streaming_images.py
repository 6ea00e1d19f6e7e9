"""Training images without labels from MDS shards, local or in an object store."""

from typing import Any

from typing_extensions import override

from d2v_composer.data.augmentation import RandomResizedCropFlip, sample_rng
from d2v_composer.data.mds_index import keep_encoded
from d2v_composer.data.verified_dataset import READ_ATTEMPTS, VerifiedDataset

__all__ = ["StreamingImages"]


class StreamingImages(VerifiedDataset):
    """Augmented images from a column of an MDS data set.

    A sample is ``{"image": (3, S, S) uint8, "sample_id": int}``, without the other columns, such as labels. Its
    augmentation depends on (seed, epoch, sample id) alone, and the order on the seed, the epoch and
    ``num_canonical_nodes``: both are the same for any number of ranks and workers, and after any resume.

    Args:
        transform: The augmentation.
        column: The column of the images: files (encoded as ``bytes``, ``jpeg`` or ``png``), or pixels (``pil``).
        seed: The seed of the order and of the augmentation.
        **kwargs: The other arguments of :class:`VerifiedDataset`.

    Raises:
        InputError: Another run uses ``local`` as its cache.
        ValueError: ``cache_limit`` is too small, or set for a local data set; or ``epoch_size`` is too large.
    """

    def __init__(self, *, transform: RandomResizedCropFlip, column: str = "image", seed: int, **kwargs: Any) -> None:
        super().__init__(seed=seed, **kwargs)
        keep_encoded(self.shards, column)
        self.column = column
        self.transform = transform
        self.seed = seed

    @override
    def get_item(self, sample_id: int, retry: int = READ_ATTEMPTS) -> dict[str, Any]:
        """Return one augmented sample of the current epoch.

        Raises:
            ShardError: Its shard cannot be fetched.
            InputError: It is not an image that can be read.
        """
        source = f"sample {sample_id} of {self.folder}"
        stored = super().get_item(sample_id, retry)[self.column]
        pixels = self.transform(stored, sample_rng(self.seed, self.epoch, int(sample_id)), source)
        return {"image": pixels, "sample_id": int(sample_id)}
