"""Training images from MDS shards, local or in an object store."""

from contextlib import suppress
from typing import Any, NamedTuple

from typing_extensions import override

from d2v_composer.data.augmentation import RandomResizedCropFlip, sample_rng
from d2v_composer.data.labelled_mds import whole_label
from d2v_composer.data.mds_index import keep_encoded
from d2v_composer.data.verified_dataset import READ_ATTEMPTS, VerifiedDataset
from d2v_composer.system.errors import InputError

__all__ = ["LabelColumn", "StreamingImages"]


class LabelColumn(NamedTuple):
    """A column of labels, numbers from 0 to below ``num_classes``."""

    name: str
    num_classes: int


class StreamingImages(VerifiedDataset):
    """Augmented images from a column of an MDS data set.

    A sample is ``{"image": (3, S, S) uint8, "sample_id": int}``, without the other columns; labels, as ``"label"``,
    only if they are asked for. Its augmentation depends on (seed, epoch, sample id) alone, and the order on the seed,
    the epoch and ``num_canonical_nodes``: both are the same for any number of ranks and workers, and after any resume.

    Args:
        transform: The augmentation.
        column: The column of the images: files (encoded as ``bytes``, ``jpeg`` or ``png``), or pixels (``pil``).
        seed: The seed of the order and of the augmentation.
        labels: Their column; default: none.
        **kwargs: The other arguments of :class:`VerifiedDataset`.

    Raises:
        InputError: Another run uses ``local`` as its cache.
        ValueError: ``cache_limit`` is too small, or set for a local data set; or ``epoch_size`` is too large.
    """

    def __init__(
        self,
        *,
        transform: RandomResizedCropFlip,
        column: str = "image",
        seed: int,
        labels: LabelColumn | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(seed=seed, **kwargs)
        keep_encoded(self.shards, column)
        self.column = column
        self.transform = transform
        self.seed = seed
        self.labels = labels

    @override
    def get_item(self, sample_id: int, retry: int = READ_ATTEMPTS) -> dict[str, Any]:
        """Return one augmented sample of the current epoch.

        Raises:
            ShardError: Its shard cannot be fetched.
            InputError: It is not an image that can be read, or its label is not that of a class.
        """
        source = f"sample {sample_id} of {self.folder}"
        stored = super().get_item(sample_id, retry)
        pixels = self.transform(stored[self.column], sample_rng(self.seed, self.epoch, int(sample_id)), source)
        sample = {"image": pixels, "sample_id": int(sample_id)}
        return sample if self.labels is None else {**sample, "label": label_of(stored, self.labels, source)}


def label_of(stored: dict[str, Any], labels: LabelColumn, source: str) -> int:
    """Return a sample's label.

    Raises:
        InputError: It is not that of a class.
    """
    value = stored[labels.name]
    with suppress(TypeError, ValueError):
        if 0 <= (label := whole_label(value)) < labels.num_classes:
            return label
    raise InputError(f"{source}: its label must be a number from 0 to {labels.num_classes - 1}, got {value!r:.40}")
