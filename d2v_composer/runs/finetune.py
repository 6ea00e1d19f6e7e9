"""Fine-tune a classifier, from the config to the report."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from composer import Trainer
from composer.core import Callback, DataSpec, Evaluator
from torch import Tensor
from torch.utils.data import DataLoader

from d2v_composer.callbacks.algorithms import SharedStatistics
from d2v_composer.checkpoints.checkpoint import LATEST
from d2v_composer.checkpoints.model_file import sizes_of
from d2v_composer.config.schema import FinetuneConfig, TrainLoaderConfig
from d2v_composer.data import modality_of
from d2v_composer.models.backbone import hash_weights
from d2v_composer.models.configs import EncoderConfig
from d2v_composer.models.precision import choose_precision
from d2v_composer.models.provenance import Record
from d2v_composer.models.teacher import Teacher
from d2v_composer.report.tables import format_table
from d2v_composer.runs.classifier import Classifier
from d2v_composer.runs.trainer import (
    build_optimizer,
    build_trainer,
    fit_and_close,
    join_and_seed,
    try_timm_student,
    write_run_report,
)
from d2v_composer.sources.labeled import LabeledSamples, eval_batches, load_mds, read_class_names
from d2v_composer.system.command_line import d2v, print_next
from d2v_composer.system.errors import InputError
from d2v_composer.system.ranks import node_leaders_first
from d2v_composer.training_data.loader import build_train_loader, read_train_index

EVALUATOR = "test"
"""Name of the evaluation in metric keys, such as metrics/test/top1."""


def finetune(config: FinetuneConfig, callbacks: Sequence[Callback] = ()) -> Trainer:
    """Fine-tune a classifier, or resume the run, and write the report.

    Args:
        config: Config of the run.
        callbacks: Callbacks besides the YAML's.

    Returns:
        The Trainer, closed.

    Raises:
        InputError: A file, data set or setting cannot be used.
    """
    join_and_seed(config)
    with node_leaders_first("the model"):
        backbone, _ = config.load()
    is_student, backbone.head = not isinstance(backbone, Teacher), None  # a head is of an earlier fine-tuning run
    backbone.alignment = None  # fitted to the weights before this run
    backbone.use_embedding(config.pooling, config.representation)
    modality = modality_of(backbone.encoder.config)
    for name in ("mixup", "cutmix") if modality.has_lengths else ():
        if getattr(config.algorithms, name) is not None:
            raise InputError(f"algorithms.{name}: must be null, because the model takes {modality.unit}")
    data = build_data(config, backbone.encoder.config)
    about = {
        "kind": "student" if is_student else "teacher",
        "path": config.model,
        "sha256": hash_weights(backbone),
        "embedding": backbone.embedding.of,
        "num_classes": data.num_classes,
        "class_names": list(data.class_names),
        "provenance": backbone.provenance,
        **({"sizes": sizes_of(backbone)} if is_student else {}),  # an export needs them
    }
    cpu_bf16 = choose_precision(config.precision).cpu_bf16
    model = Classifier(backbone, data.num_classes, train_encoder=config.train_encoder, cpu_bf16=cpu_bf16)
    try_timm_student("model", backbone, config, model.head)
    tested = eval_batches(data.test, config.device_eval_batch_size)
    trainer = build_trainer(
        config,
        model,
        data.train_loader,
        {"model": about, "data": data.about},
        run_callbacks=[SharedStatistics()],
        callbacks=callbacks,
        prepare=model.prepare,
        eval_dataloader=Evaluator(label=EVALUATOR, dataloader=DataSpec(tested, microbatch_transforms=model.prepare)),
        eval_interval=config.eval_interval,
        optimizers=build_optimizer(config.optimizer, model, model.depth_of_trained, config.optimizer.layer_decay),
    )
    header = {
        modality.unit: f"{data.about['samples']:,} for training, {len(data.test.labels):,} for testing, "
        f"{data.num_classes} classes",
        "start": config.model,
    }
    fit_and_close(trainer, config, header, lambda: report(trainer, config, model, modality.unit))
    folder = config.run_folder
    if folder is not None and is_student:
        print_next(d2v("export", folder.local / LATEST, folder.local / "classifier.safetensors"))
    return trainer


def report(trainer: Trainer, config: FinetuneConfig, model: Classifier, unit: str) -> None:
    """Print the accuracy of the last evaluation, and write the report into the run's folder."""
    metrics = trainer.state.eval_metric_values
    results = {name: float(metrics[name]) for name in model.metrics if name in metrics}
    if results:
        loss = f"{results.pop('loss'):.4f}"
        row = [config.run_name, *(f"{100 * value:.2f}" for value in results.values()), loss]
        table = format_table(["", *(name.replace("top", "top-") for name in results), "loss"], [row])
        print(f"\n{EVALUATOR} {unit}, batch {int(trainer.state.timestamp.batch)}, accuracy in %\n{table}")
    write_run_report(trainer, config)


class LabeledData(NamedTuple):
    """Training and test samples of a fine-tuning run."""

    train_loader: DataLoader
    """Loader of this rank's augmented training samples, with labels."""
    test: LabeledSamples
    class_names: tuple[str, ...]
    """Name of each class; empty if the classes have no names."""
    num_classes: int
    about: Record
    """The section ``data`` of the run's record."""


def build_data(config: FinetuneConfig, sizes: EncoderConfig) -> LabeledData:
    """Build the loader of training samples, and load the test samples, for an encoder of these ``sizes``."""
    dataset, root, modality = config.dataset, Path(config.dataset.root), modality_of(sizes)
    loader = TrainLoaderConfig(**config.train_loader.model_dump(), local=str(root / "train"), column=dataset.column)
    index = read_train_index(loader, modality, config.global_train_batch_size, dataset.label_column)
    with node_leaders_first("the test samples and the classes"):
        test = load_mds(root / "test", modality, dataset.column, dataset.label_column)
        class_names = read_class_names(root)
    num_classes = count_classes(root, class_names, test.labels)
    train_loader = build_train_loader(config, loader, index, num_classes=num_classes)
    digest = hashlib.sha256()
    for tensor in (*test.samples, test.labels):
        digest.update(tensor.contiguous().numpy().data)
    about = {**index.describe(), "test_sha256": digest.hexdigest()}
    return LabeledData(train_loader, test, class_names, num_classes, about)


def count_classes(root: Path, class_names: tuple[str, ...], tested: Tensor) -> int:
    """Return the number of classes, given their names and the labels of the test samples, (N,)."""
    labels = tested.unique()
    smallest, largest, num_known = int(labels.min()), int(labels.max()), max(len(class_names), len(labels))
    if num_known < 2:
        raise InputError(f"dataset.root: {root}: expected at least two classes, got {num_known}")
    if smallest < 0:
        raise InputError(f"dataset.root: {root}: labels must not be negative, got {smallest}")
    if largest >= 100 * num_known:  # the classifier has an output for each number
        classes = f"{num_known} classes with labels up to {largest}"
        raise InputError(f"dataset.root: {root}: expected classes numbered from 0 without large gaps, got {classes}")
    return max(len(class_names), largest + 1)
