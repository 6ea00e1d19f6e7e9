"""The samples of a detector: images with boxes."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from d2v_composer.data.images import read_image, resized_crop
from d2v_composer.data.modality import sample_rng
from d2v_composer.sources.coco import Boxes
from d2v_composer.system.errors import InputError, reading
from d2v_composer.training_data.sampler import EpochOrder, OrderedSamples, Sample


class BoxedSamples(OrderedSamples):
    """Images with boxes, resized to fit one size and padded with black at the right or the bottom.

    A sample is a tuple of the image, (3, height, width) uint8; the boxes, (M, 4) float32: left, top, right and
    bottom, in pixels of the resized image; the classes, (M,) int64, from 1; and COCO's ``iscrowd`` of the boxes, (M,)
    bool.

    Args:
        source: The images.
        size: Height and width, in pixels.
        interpolation: Filter of the resizing: ``bicubic`` or ``bilinear``.
        flip: Probability of a horizontal flip.
        seed: Seed of the flips and of the order.
        epoch_size: Number of samples in an epoch; default: all samples.
    """

    def __init__(
        self,
        source: Boxes,
        size: tuple[int, int],
        interpolation: str,
        flip: float = 0.0,
        seed: int = 0,
        epoch_size: int | None = None,
    ) -> None:
        self.source, self.size, self.interpolation, self.flip, self.seed = source, size, interpolation, flip, seed
        self.order = EpochOrder(np.array([len(source)]), seed=seed, epoch_size=epoch_size)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, sample: Sample | int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return a sample, flipped at random if ``sample`` is a :class:`Sample`, and not flipped if it is an index.

        Raises:
            InputError: The image cannot be decoded, or does not have the size in the annotations.
        """
        epoch, number = (0, sample) if isinstance(sample, int) else (sample.epoch, sample.sample_id)
        source, path = self.source, self.source.folder / self.source.names[number]
        with reading(path):
            stored = path.read_bytes()
        image, (width, height) = read_image(stored, str(path)), source.sizes[number].tolist()
        if image.size != (width, height):
            found = "{} x {}".format(*image.size)
            raise InputError(f"{path}: its annotations are for {width} x {height} pixels, but it has {found}")
        scale = min(self.size[0] / height, self.size[1] / width)
        shape = max(1, round(scale * height)), max(1, round(scale * width))
        pixels = resized_crop(image, shape, self.interpolation)
        its = slice(source.first[number], source.first[number + 1])
        boxes = torch.from_numpy(source.boxes[its]) * torch.tensor([shape[1] / width, shape[0] / height]).repeat(2)
        if not isinstance(sample, int) and sample_rng(self.seed, epoch, number).random() < self.flip:
            pixels = pixels.flip(-1)
            boxes = torch.stack([shape[1] - boxes[:, 2], boxes[:, 1], shape[1] - boxes[:, 0], boxes[:, 3]], dim=1)
        pixels = pad(pixels, (0, self.size[1] - shape[1], 0, self.size[0] - shape[0]))
        return pixels, boxes, torch.from_numpy(source.labels[its]), torch.from_numpy(source.crowds[its])


def collate_boxes(samples: Sequence[Iterable[Any]]) -> tuple[Tensor, ...]:
    """Return a batch: images, (B, 3, height, width); boxes, (B, M, 4); classes, (B, M); and ``iscrowd``, (B, M).

    M is the largest number of boxes of an image. Images with fewer boxes get boxes of class 0.
    """
    images, *rest = zip(*samples, strict=True)
    return torch.stack(images), *(pad_sequence(list(values), batch_first=True) for values in rest)
