"""Build a detector's run from its config (backbone, data, Trainer); then train, report and close."""

from collections.abc import Sequence
from pathlib import Path

import torch
from composer import Trainer
from composer.core import Callback, DataSpec, Evaluator
from composer.utils import dist
from torch.utils.data import DataLoader

from d2v_composer.callbacks.algorithms import SharedStatistics
from d2v_composer.checkpoints.checkpoint import LATEST
from d2v_composer.checkpoints.load import load_models
from d2v_composer.checkpoints.model_file import sizes_of
from d2v_composer.config.detection import CocoConfig, DetectConfig
from d2v_composer.models.backbone import Backbone, hash_weights
from d2v_composer.models.configs import height_and_width
from d2v_composer.models.detection import Detector
from d2v_composer.models.names import TIMM_PREFIX
from d2v_composer.models.precision import choose_precision
from d2v_composer.models.teacher import Teacher
from d2v_composer.models.timm_network import TimmStudent, config_of
from d2v_composer.runs.finetune import EVALUATOR
from d2v_composer.runs.trainer import (
    build_optimizer,
    build_trainer,
    fit_and_close,
    join_and_seed,
    write_run_report,
)
from d2v_composer.sources.coco import Boxes, read_coco
from d2v_composer.sources.source import worker_options
from d2v_composer.system.command_line import d2v, print_next
from d2v_composer.system.errors import InputError, errors_of
from d2v_composer.system.ranks import node_leaders_first
from d2v_composer.training_data.boxes import BoxedSamples, collate_boxes
from d2v_composer.training_data.loader import check_memory


def detect(config: DetectConfig, callbacks: Sequence[Callback] = ()) -> Trainer:
    """Train a detector on a student's features, from the run's last checkpoint if there is one, and report.

    Args:
        config: Config of the run.
        callbacks: Further callbacks, besides the YAML's.

    Returns:
        The Trainer, closed.

    Raises:
        InputError: A file, data set or setting cannot be used.
    """
    join_and_seed(config)
    train, test = (read_split(config, name) for name in ("train", "test"))
    check_splits(config, train, test)
    with node_leaders_first("the model"):
        student = load_backbone(config)
    sizes, num_classes = student.encoder.config, len(train.class_names)
    form = height_and_width(sizes.image_size), sizes.interpolation
    about = {
        "kind": "student",
        "path": config.model,
        "sha256": hash_weights(student),
        "num_classes": num_classes,
        "class_names": list(train.class_names.values()),
        "provenance": student.provenance,
        "sizes": sizes_of(student),
        "prefix": Detector.STUDENT,
    }
    data = {"modality": "image", "location": str(train.folder), "samples": len(train), "sha256": train.sha256}
    cpu_bf16 = choose_precision(config.precision).cpu_bf16
    model = Detector(student, num_classes, config.detector, config.channels, config.frozen_stages, cpu_bf16)
    tested = build_test_loader(config, test, *form)
    trainer = build_trainer(
        config,
        model,
        build_loader(config, train, *form),
        {"model": about, "data": {**data, "test_sha256": test.sha256}},
        run_callbacks=[SharedStatistics()],
        callbacks=callbacks,
        prepare=model.prepare,
        eval_dataloader=Evaluator(label=EVALUATOR, dataloader=DataSpec(tested, microbatch_transforms=model.prepare)),
        eval_interval=config.eval_interval,
        optimizers=build_optimizer(config.optimizer, model, model.depth_of_trained, config.optimizer.backbone_lr_ratio),
    )
    header = {
        "images": f"{len(train):,} for training, {len(test):,} for testing, {num_classes} classes",
        "boxes": "; ".join(f"{name}: {describe(boxes)}" for name, boxes in (("train", train), ("test", test))),
        "start": config.model if config.pretrained else f"{config.model}, random weights",
    }
    fit_and_close(trainer, config, header, lambda: report(trainer, config))
    if (folder := config.run_folder) is not None:
        print_next(d2v("export", folder.local / LATEST, folder.local / "backbone.safetensors"))
    return trainer


def report(trainer: Trainer, config: DetectConfig) -> None:
    """Print the average precision of the last evaluation, and write the report into the run's folder."""
    if metrics := trainer.state.eval_metric_values:
        whole, at_50 = (f"{100 * float(metrics[name]):.1f}" for name in ("map", "map_50"))
        batch = int(trainer.state.timestamp.batch)
        print(f"\n{EVALUATOR} images, batch {batch}: average precision {whole} %, at an IoU of 0.5 {at_50} %")
    write_run_report(trainer, config)


def load_backbone(config: DetectConfig) -> Backbone:
    """Load a student without alignment and head, or build a timm model, for the run's image size.

    Raises:
        InputError: The file is not a student's, or the model cannot be built for this size.
    """
    size = config.image_size
    if config.model.startswith(TIMM_PREFIX) and not Path(config.model).exists():
        with errors_of("model"):
            network = config_of(config.model)
            network = network if size is None else network.changed(image_size=size)
            return TimmStudent(network, pretrained=config.pretrained)
    if not config.pretrained:
        raise InputError(f"pretrained: must be true unless the model is timm/NAME, got {config.model}")
    student, _ = load_models(config.model)
    if isinstance(student, Teacher):
        raise InputError(f"model: {config.model} is a teacher; expected a student or timm/NAME")
    student.head = student.alignment = None  # of the weights before this run
    if size in (None, student.encoder.config.image_size):
        return student
    if not isinstance(student, TimmStudent):
        own = student.encoder.config.image_size
        raise InputError(f"image_size: must be {own}, the only one of a student of blocks, got {size}")
    with errors_of("image_size"):
        return student.resized(size)


def read_split(config: DetectConfig, name: str) -> Boxes:
    """Read the images and boxes of a section of ``dataset``."""
    split: CocoConfig = getattr(config.dataset, name)
    file = None if split.annotations is None else Path(split.annotations)
    with node_leaders_first(f"the {name} images"), errors_of(f"dataset.{name}", InputError):
        return read_coco(Path(split.images), file, with_crowds=name == "test")


def check_splits(config: DetectConfig, train: Boxes, test: Boxes) -> None:
    """Check that two splits have the same classes, and enough images.

    Raises:
        InputError: They differ, or there are too few.
    """
    if train.class_names != test.class_names:
        differing = dict(train.class_names.items() ^ test.class_names.items())
        raise InputError(f"dataset: train and test have different categories, of the ids {sorted(differing)}")
    if not len(train.boxes):
        raise InputError(f"dataset.train: {train.folder} has no boxes")
    if len(train) < config.global_train_batch_size:
        size = config.global_train_batch_size
        raise InputError(f"{train.folder} has {len(train)} images, fewer than global_train_batch_size {size}")


def describe(boxes: Boxes) -> str:
    """Return the number of boxes, and of those that were left out or cut off."""
    return ", ".join([f"{len(boxes.boxes):,}", *(f"{count:,} {kind}" for kind, count in boxes.left_out.items())])


def build_loader(config: DetectConfig, train: Boxes, size: tuple[int, int], interpolation: str) -> DataLoader:
    """Build this rank's loader of training images, with their boxes.

    Raises:
        InputError: The node has too little shared memory.
    """
    loader, batch_size = config.train_loader, config.global_train_batch_size
    check_memory(loader, batch_size, 3 * size[0] * size[1])
    whole = len(train) // batch_size * batch_size
    samples = BoxedSamples(train, size, interpolation, loader.flip, config.seed, whole)
    options = worker_options(loader.num_workers, loader.prefetch_factor, torch.cuda.is_available())
    return DataLoader(
        samples, batch_size // dist.get_world_size(), sampler=samples.order, collate_fn=collate_boxes, **options
    )


def build_test_loader(config: DetectConfig, test: Boxes, size: tuple[int, int], interpolation: str) -> DataLoader:
    """Build this rank's loader of test images; Composer drops images that fill up the last batch."""
    samples = BoxedSamples(test, size, interpolation)
    options = worker_options(config.train_loader.num_workers, config.train_loader.prefetch_factor, False)
    numbers = dist.get_sampler(samples)
    return DataLoader(samples, config.device_eval_batch_size, sampler=numbers, collate_fn=collate_boxes, **options)
