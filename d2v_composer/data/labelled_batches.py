"""Batches of labelled images that are in memory: augmented ones to train on, plain ones to evaluate."""

from collections.abc import Iterator

import torch
from composer.utils import dist
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset
from typing_extensions import override

from d2v_composer.data.augmentation import RandomResizedCropFlip, sample_rng
from d2v_composer.data.labelled_sets import LabelledImages
from d2v_composer.system.worker_lifetime import FORK, end_with_parent

__all__ = ["AugmentedImages", "EpochSampler", "eval_batches", "train_batches"]

Place = tuple[int, int]


class AugmentedImages(Dataset[tuple[Tensor, Tensor]]):
    """Augmented images with their labels: (3, S, S) uint8 and int64.

    A sample's index is its epoch and its id. Its augmentation depends on (seed, epoch, id) alone: it is the same for
    any number of workers and ranks, and after any resume.

    Args:
        labelled: The images.
        transform: The augmentation.
        seed: Its seed.
    """

    def __init__(self, labelled: LabelledImages, transform: RandomResizedCropFlip, seed: int) -> None:
        self.labelled = labelled
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.labelled.labels)

    def __getitem__(self, place: Place) -> tuple[Tensor, Tensor]:
        epoch, i = place
        image = Image.fromarray(self.labelled.images[i].permute(1, 2, 0).numpy())
        return self.transform(image, sample_rng(self.seed, epoch, i), f"image {i}"), self.labelled.labels[i]


class EpochSampler(DistributedSampler[Place]):
    """Yield this rank's share of an epoch in random order, as :class:`AugmentedImages` wants it.

    A batch of all ranks together has the same images on any number of ranks. Composer sets the epoch, and skips the
    batches of an epoch that were trained before a resume.

    Args:
        dataset: Of whose images each epoch leaves out some.
        global_batch_size: An epoch is the largest whole number of such batches.
        seed: The seed of the order.
    """

    def __init__(self, dataset: AugmentedImages, global_batch_size: int, seed: int) -> None:
        ranks = dist.get_world_size()
        super().__init__(dataset, ranks, dist.get_global_rank(), shuffle=True, seed=seed)  # pyright: ignore[reportArgumentType]: its items are places
        self.total_size = len(dataset) // global_batch_size * global_batch_size
        self.num_samples = self.total_size // ranks

    @override
    def __iter__(self) -> Iterator[Place]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator)[: self.total_size]  # pyright: ignore[reportArgumentType]: sized
        return ((self.epoch, i) for i in order[self.rank :: self.num_replicas].tolist())


def train_batches(
    dataset: AugmentedImages, global_batch_size: int, num_workers: int, prefetch_factor: int
) -> DataLoader:
    """Return the loader of this rank's augmented batches.

    Args:
        dataset: The images.
        global_batch_size: Over all ranks.
        num_workers: Processes that augment; 0: this one.
        prefetch_factor: Batches that each makes in advance.
    """
    has_workers = num_workers > 0
    return DataLoader(
        dataset,
        batch_size=global_batch_size // dist.get_world_size(),
        sampler=EpochSampler(dataset, global_batch_size, dataset.seed),
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if has_workers else None,
        persistent_workers=has_workers,
        multiprocessing_context=FORK if has_workers else None,
        worker_init_fn=_start_worker if has_workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def eval_batches(labelled: LabelledImages, batch_size: int) -> DataLoader:
    """Return the loader of this rank's share of all images, as they are; Composer drops the last ranks' padding."""
    dataset = TensorDataset(labelled.images, labelled.labels)
    return DataLoader(dataset, batch_size, sampler=dist.get_sampler(dataset), pin_memory=torch.cuda.is_available())


def _start_worker(number: int) -> None:
    end_with_parent()
