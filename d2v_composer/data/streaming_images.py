"""Training images from MDS shards, local or in an object store, without labels."""

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from PIL import Image
from streaming import StreamingDataset

from d2v_composer.data.transforms import RandomResizedCropFlip, decode_rgb, sample_rng

__all__ = ["StreamingImages"]


class StreamingImages(StreamingDataset):
    """Augmented images of an MDS data set with a column ``image`` (an image file's bytes).

    A sample is ``{"image": (3, S, S) uint8, "sample_id": int}``; other columns, a label for one, are not passed on.
    Its augmentation depends on (seed, epoch, sample id) alone, and with ``num_canonical_nodes`` given so does the
    order: both are the same for any number of ranks and workers and after any resume.

    An epoch that loses a shard raises, where the base class would end it early.

    Args:
        local: The data set, or where the shards of a remote one are kept.
        remote: Its address in an object store, or ``None``.
        batch_size: Of one device.
        transform: The augmentation.
        seed: Of the order and of the augmentation.
        shuffle: Whether the order is random, another in every epoch.
        num_canonical_nodes: Into how many equal parts the order is cut; nodes must divide it or be its multiple.
        epoch_size: How many of the samples make an epoch, drawn anew for each; default all.
        cache_limit: What ``local`` may hold of a remote data set, in bytes or as '100gb'; default all.
        **kwargs: As :class:`streaming.StreamingDataset`'s.
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
        epoch_size: int | None = None,
        cache_limit: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            local=str(local),
            remote=remote,
            batch_size=batch_size,
            shuffle=shuffle,
            shuffle_seed=seed,
            # Not the defaults: those depend on the number of nodes, and a resume on another number would see
            # another order.
            shuffle_algo="py1e",
            num_canonical_nodes=num_canonical_nodes,
            epoch_size=epoch_size,
            cache_limit=cache_limit,
            **kwargs,
        )
        self.folder = str(local)
        self.transform = transform
        self.seed = seed
        self.epoch = 0
        self.failure: BaseException | None = None

    def _resume_incr_epoch(self) -> tuple[int, int]:
        # The base class tells nobody which epoch a worker is in, and only here, after a resume was seen, it is right.
        self.epoch, sample_in_epoch = super()._resume_incr_epoch()
        return self.epoch, sample_in_epoch

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """One augmented sample of the present epoch.

        Raises:
            InputError: It is no image that can be read.
            RuntimeError: Its shard cannot be had.
        """
        source = f"sample {sample_id} of {self.folder}"
        try:
            stored = super().get_item(sample_id, retry)["image"]
        except Exception as error:
            raise RuntimeError(f"{source}: its shard is missing or damaged") from error
        image = stored.convert("RGB") if isinstance(stored, Image.Image) else decode_rgb(stored, source)
        pixels = self.transform(image, sample_rng(self.seed, self.epoch, int(sample_id)))
        return {"image": pixels, "sample_id": int(sample_id)}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """This worker's samples of the next epoch.

        Raises:
            RuntimeError: A shard could not be had; the base class would end the epoch as if it were complete.
        """
        yield from super().__iter__()
        if self._event.is_set():
            raise RuntimeError(
                f"{self.folder}: a shard is missing or damaged, the epoch is not whole"
            ) from self.failure

    def on_exception(self, future: Future) -> None:
        self.failure = self.failure or future.exception()
        super().on_exception(future)
