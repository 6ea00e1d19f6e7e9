"""Batches of labeled images in memory: the same for any number of workers and ranks."""

import torch

from d2v_composer.data.images import RandomResizedCropFlip
from d2v_composer.data.labeled import AugmentedImages, EpochSampler, LabeledImages, train_batches
from helpers import time_limit

NUM_IMAGES, BATCH_SIZE = 23, 4


def augmented() -> AugmentedImages:
    images = torch.randint(0, 256, (NUM_IMAGES, 3, 16, 16), dtype=torch.uint8, generator=torch.manual_seed(1))
    return AugmentedImages(LabeledImages(images, torch.arange(NUM_IMAGES)), RandomResizedCropFlip(8), seed=5)


def epoch_of(workers: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    loader = train_batches(augmented(), BATCH_SIZE, workers, prefetch_factor=2)
    sampler = loader.sampler
    assert isinstance(sampler, EpochSampler)
    sampler.set_epoch(epoch)
    with time_limit(30):
        images, labels = map(torch.cat, zip(*loader, strict=True))
    return images, labels


def test_an_epoch_is_the_same_with_workers_and_differs_from_the_next() -> None:
    images, labels = epoch_of(workers=0, epoch=1)
    assert len(set(labels.tolist())) == len(labels) == 20
    again, labels_again = epoch_of(workers=2, epoch=1)
    assert torch.equal(images, again)
    assert torch.equal(labels, labels_again)
    assert not torch.equal(labels, epoch_of(workers=0, epoch=2)[1])
