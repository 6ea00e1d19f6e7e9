"""Train a detector, from the config to the report."""

from collections.abc import Sequence
from pathlib import Path

import torch
from composer import Trainer
from composer.core import Callback, Evaluator
from composer.utils import dist
from torch.utils.data import DataLoader

from d2v_composer.callbacks.algorithms import SharedStatistics
from d2v_composer.checkpoints.checkpoint import LATEST
from d2v_composer.checkpoints.load import load_models
from d2v_composer.checkpoints.model_file import sizes_of
from d2v_composer.config.detection import CocoConfig, DetectConfig
from d2v_composer.models.backbone import Backbone, hash_weights
from d2v_composer.models.configs import height_and_width
from d2v_composer.models.names import TIMM_PREFIX
from d2v_composer.models.precision import choose_precision
from d2v_composer.models.teacher import Teacher
from d2v_composer.models.timm_network import TimmStudent, config_of
from d2v_composer.runs.detector import Detector
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
    """Train a detector on a student's features, or resume the run, and write the report.

    Args:
        config: Config of the run.
        callbacks: Callbacks besides the YAML's.

    Returns:
        The Trainer, closed.

    Raises:
        InputError: A file, data set or setting cannot be used.
    """
    join_and_seed(config)
    train, test = (read_split(config, name) for name in ("train", "test"))
    if train.class_names != test.class_names:  # labels are their positions
        differing = dict(train.class_names.items() ^ test.class_names.items())
        raise InputError(f"dataset: train and test differ in the categories with the ids {sorted(differing)}")
    with node_leaders_first("the model"):
        student = load_backbone(config)
    about = {
        "kind": "student",
        "path": config.model,
        "sha256": hash_weights(student),
        "num_classes": len(train.class_names),
        "class_names": list(train.class_names.values()),
        "provenance": student.provenance,
        "sizes": sizes_of(student),
        "prefix": Detector.STUDENT,
    }
    data = {"modality": "image", "location": str(train.folder), "samples": len(train), "sha256": train.sha256}
    cpu_bf16 = choose_precision(config.precision).cpu_bf16
    model = Detector(student, len(train.class_names), config.channels, config.frozen_stages, cpu_bf16)
    train_loader, test_loader = build_loaders(config, train, test, student)
    trainer = build_trainer(
        config,
        model,
        train_loader,
        {"model": about, "data": {**data, "test_sha256": test.sha256}},
        run_callbacks=[SharedStatistics()],
        callbacks=callbacks,
        eval_dataloader=Evaluator(label=EVALUATOR, dataloader=test_loader),
        eval_interval=config.eval_interval,
        optimizers=build_optimizer(config.optimizer, model, model.depth_of_trained, config.optimizer.backbone_lr_ratio),
    )
    header = {
        name: f"{len(split):,} images, {len(split.boxes):,} boxes, {split.left_out:,} boxes left out (tiny or crowds)"
        for name, split in (("train", train), ("test", test))
    }
    header["start"] = config.model if config.pretrained else f"{config.model}, random weights"
    fit_and_close(trainer, config, header, lambda: report(trainer, config))
    if (folder := config.run_folder) is not None:
        print_next(d2v("export", folder.local / LATEST, folder.local / "backbone.safetensors"))
    return trainer


def report(trainer: Trainer, config: DetectConfig) -> None:
    """Print the average precision of the last evaluation, and write the report into the run's folder."""
    if metrics := trainer.state.eval_metric_values:
        whole, at_50 = (f"{100 * float(metrics[name]):.1f}" for name in ("map", "map_50"))
        batch = int(trainer.state.timestamp.batch)
        print(f"\n{EVALUATOR} images, batch {batch}: average precision {whole} %, and {at_50} % at an IoU of 0.5")
    write_run_report(trainer, config)


def load_backbone(config: DetectConfig) -> Backbone:
    """Load a student, or build a timm model, for the run's image size.

    Raises:
        InputError: The model is not a student that takes images, or does not fit ``image_size`` or ``pretrained``.
    """
    size = config.image_size
    if config.model.startswith(TIMM_PREFIX) and not Path(config.model).exists():
        with errors_of("model"):
            network = config_of(config.model)
            network = network if size is None else network.changed(image_size=size)
            return TimmStudent(network, pretrained=config.pretrained)
    if not config.pretrained:
        raise InputError(f"pretrained: must be true unless the model is timm/NAME; the model is {config.model}")
    student, _ = load_models(config.model)
    sizes = student.encoder.config
    if isinstance(student, Teacher) or sizes.modality != "image":
        raise InputError(f"model: expected a student that takes images, or timm/NAME; got {config.model}")
    student.head = student.alignment = None  # of the weights before this run
    if size in (None, sizes.image_size):
        return student
    if not isinstance(student, TimmStudent):
        rule = f"must be {sizes.image_size}, because only a student that is a timm model can be resized"
        raise InputError(f"image_size: {rule}; got {size}")
    with errors_of("image_size"):
        return student.resized(size)


def read_split(config: DetectConfig, name: str) -> Boxes:
    """Read the boxes, and the paths of the images, of ``dataset.train`` or ``dataset.test``."""
    split: CocoConfig = getattr(config.dataset, name)
    with node_leaders_first(f"the {name} images"), errors_of(f"dataset.{name}", InputError):
        return read_coco(Path(split.images), Path(split.annotations), with_crowds=name == "test")


def build_loaders(config: DetectConfig, train: Boxes, test: Boxes, student: Backbone) -> tuple[DataLoader, DataLoader]:
    """Build this rank's loaders of training images and of test images, with their boxes.

    Raises:
        InputError: There are too few training images, or the node has too little shared memory.
    """
    loader, batch_size, sizes = config.train_loader, config.global_train_batch_size, student.encoder.config
    if len(train) < batch_size:
        rule = f"must be at most {len(train)}, the number of images in {train.folder}"
        raise InputError(f"global_train_batch_size: {rule}; got {batch_size}")
    shape = height_and_width(sizes.image_size)
    check_memory(loader, batch_size, 3 * shape[0] * shape[1])
    whole = len(train) // batch_size * batch_size
    samples = BoxedSamples(train, shape, sizes.interpolation, loader.flip, config.seed, whole)
    tested = BoxedSamples(test, shape, sizes.interpolation)
    options = worker_options(loader.num_workers, loader.prefetch_factor, torch.cuda.is_available())
    options["collate_fn"] = collate_boxes
    return (
        DataLoader(samples, batch_size // dist.get_world_size(), sampler=samples.order, **options),
        # Composer drops the images that fill up the last batch.
        DataLoader(tested, config.device_eval_batch_size, sampler=dist.get_sampler(tested), **options),
    )
