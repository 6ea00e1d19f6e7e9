"""Distill a student, from the config to the report."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from composer import Trainer
from composer.core import Algorithm, Callback
from composer.loggers import LoggerDestination
from torch.utils.data import DataLoader, Subset

from d2v_composer.callbacks.alignment import AlignStudent
from d2v_composer.callbacks.checkpointing import Stop
from d2v_composer.callbacks.zero_shot_retrieval import ZeroShotRetrieval
from d2v_composer.checkpoints.load import load_teacher
from d2v_composer.checkpoints.model_file import sizes_of
from d2v_composer.config.schema import TeacherSection, TrainConfig
from d2v_composer.data import build_augmentation, modality_of
from d2v_composer.data.modality import Samples
from d2v_composer.evaluation.embedded_set import Embed
from d2v_composer.evaluation.evaluate import cost, share_encoders
from d2v_composer.evaluation.rows import STUDENT, TEACHER
from d2v_composer.models.alignment import MIN_PAIRS
from d2v_composer.models.names import DATA2VEC2, EMBEDDING
from d2v_composer.models.precision import choose_precision
from d2v_composer.models.provenance import Record
from d2v_composer.models.teacher import Teacher
from d2v_composer.objectives.compilation import check_compiler, compile_model
from d2v_composer.objectives.distillation import DistillationModel
from d2v_composer.report.tables import cost_table, format_table, format_tables
from d2v_composer.runs.comparison import build_labeled_sets
from d2v_composer.runs.trainer import (
    build_optimizer,
    build_trainer,
    fit_and_close,
    join_and_seed,
    try_timm_student,
    write_run_report,
)
from d2v_composer.sources.labeled import evenly_spaced
from d2v_composer.sources.mds import Index, choose_alignment_samples
from d2v_composer.sources.source import Source, open_mds
from d2v_composer.system.errors import InputError, errors_of
from d2v_composer.system.ranks import node_leaders_first, raise_on_all_ranks
from d2v_composer.training_data.loader import build_train_loader, read_train_index


def train_student(
    config: TrainConfig,
    callbacks: Sequence[Callback] = (),
    *,
    teacher: Teacher | None = None,
    train_dataloader: DataLoader[object] | None = None,
    alignment_samples: Samples | None = None,
    algorithms: Sequence[Algorithm] = (),
    loggers: Sequence[LoggerDestination] = (),
    when_built: Callable[[Trainer], object] = lambda trainer: None,
) -> Trainer:
    """Train a student, or resume the run, and write the report. Call this function on every rank.

    Args:
        config: Config of the run.
        callbacks, algorithms, loggers: Callbacks, algorithms and loggers besides the YAML's.
        teacher: The config's teacher, if it is loaded already.
        train_dataloader: This rank's loader of training samples, instead of the section ``train_loader``.
        alignment_samples: With a ``train_dataloader``, the samples to which :class:`AlignStudent` fits the alignment;
            default: no alignment.
        when_built: Function that is called with the Trainer before the training.

    Returns:
        The Trainer, closed.

    Raises:
        InputError: A file, data set or setting cannot be used.
        RunError: The training cannot go on; the message says why.

    Example:
        >>> config = load_config(["quickstart.yaml", "max_duration=1ba", "retrieval.datasets={}"])
        >>> trainer = train_student(config)  # doctest: +ELLIPSIS
        run       quickstart, saved in runs/quickstart
        ...
    """
    join_and_seed(config)
    problem = None if train_dataloader is not None else config.train_loader.find_missing_data()
    raise_on_all_ranks(problem and f"train_loader{problem}")  # before the teacher is fetched
    model = build_model(config, teacher)
    costs = {STUDENT: cost(model.student, fitted_width(config, model)), TEACHER: cost(model.teacher)}
    apply_precision_and_compile(config, model)
    modality = modality_of(model.teacher.config)
    data = build_data(config, model, train_dataloader, alignment_samples)
    align, stop = build_alignment(config, model, data.alignment_samples), Stop()
    retrieval = build_retrieval(config, model, align, stop)
    student = model.student.provenance["student"] | {"sizes": sizes_of(model.student)}
    trainer = build_trainer(
        config,
        model,
        data.loader,
        {"teacher": model.teacher.provenance, "student": student, "data": data.about, "costs": costs},
        run_callbacks=[callback for callback in (align, retrieval) if callback is not None],
        callbacks=callbacks,
        algorithms=algorithms,
        loggers=loggers,
        stop=stop,
        optimizers=build_optimizer(config.optimizer, model),
    )
    when_built(trainer)
    header = {modality.unit: data.shown}
    fitted = model.teacher.embedding._replace(made_by="alignment")
    header["embedding"] = str(model.student.embedding if align is None else fitted)
    if retrieval is not None:
        sets, headline = ", ".join(retrieval.datasets), retrieval.settings.headline
        shown = "the embedding" if headline == EMBEDDING else headline
        header["retrieval"] = f"{sets}, every {config.retrieval.interval}; tables show {shown}"

    def report() -> None:
        if retrieval is not None and retrieval.history:
            head, *rows = cost_table(costs, modality.cost_unit)
            print(f"\n{format_tables(retrieval.results, retrieval.datasets)}\n\n{format_table(head, rows)}")
        write_run_report(trainer, config, retrieval)

    fit_and_close(trainer, config, header, report)
    return trainer


class TrainingData(NamedTuple):
    """The training data of a run."""

    loader: DataLoader[object]
    alignment_samples: Samples | None
    """The samples to which the student's alignment is fitted; ``None``: no alignment is fitted."""
    about: Record
    """The section ``data`` of the run's record."""
    shown: str
    """The description of the data in the first lines of the log."""


def build_data(
    config: TrainConfig, model: DistillationModel, given: DataLoader[object] | None, samples: Samples | None
) -> TrainingData:
    """Build the training data from the section ``train_loader``, or from a ``given`` loader and its ``samples``."""
    modality, loader = modality_of(model.teacher.config), config.train_loader
    if given is not None:
        shown = f"from train_dataloader{'' if samples is not None else '; no alignment without alignment_samples'}"
        return TrainingData(given, samples, {"modality": modality.name}, shown)
    index = read_train_index(loader, modality, config.global_train_batch_size)
    built = build_train_loader(config, loader, index, is_compiled=config.compile is not False)
    shown = (
        f"{len(index):,} in {index.source}{'' if index.has_hashes else ', checked by size, as the index has no hashes'}"
    )
    return TrainingData(built, open_alignment_samples(config, index), index.describe(), shown)


def build_model(config: TrainConfig, teacher: Teacher | None = None) -> DistillationModel:
    """Build the model from the sections ``teacher``, ``student`` and ``objectives``."""
    with node_leaders_first("the teacher"):
        teacher = teacher or build_teacher(config)
    set_teachers_embedding(config, teacher)
    check_compiler(config.compile)
    with errors_of("student"):
        normalization = config.objectives.tokens.model_dump(include={"normalization", "final_layer_norm"})
        torch.manual_seed(config.seed)  # here, so that an evaluation builds the same untrained student
        student = teacher.build_student(**config.student.model_dump(), **normalization)
    try_timm_student("student.model", student, config)
    with errors_of("objectives.tokens"):  # the others name themselves
        return DistillationModel(
            teacher,
            student,
            objectives=dict(config.objectives),
            cpu_bf16=choose_precision(config.precision).cpu_bf16,
        )


def apply_precision_and_compile(config: TrainConfig, model: DistillationModel) -> None:
    """Cast the teacher to the run's precision and, if set, compile the model and turn on activation checkpointing."""
    model.teacher.cast_weights(choose_precision(config.precision).dtype)
    if config.compile:
        compile_model(model, config.compile)
    if config.activation_checkpointing:
        with errors_of("activation_checkpointing"):  # timm has none for some models
            model.student.checkpoint_activations()


def build_teacher(config: TrainConfig) -> Teacher:
    """Load the teacher that the section ``teacher`` describes."""
    section = config.teacher.model_dump()
    try:
        return load_teacher(section.pop("checkpoint"), **section)
    except InputError as error:
        key = "teacher." if str(error).startswith(tuple(TeacherSection.model_fields)) else "teacher.checkpoint: "
        raise InputError(f"{key}{error}") from error


def set_teachers_embedding(config: TrainConfig, teacher: Teacher) -> None:
    """Use the embedding that the section ``alignment`` names, if any, as the teacher's embedding."""
    alignment, section = config.alignment, config.teacher
    with errors_of("alignment"):
        teacher.use_embedding(alignment.pooling, alignment.representation)
    if alignment.representation == "layer_mean" and section.first_blocks is not None and section.model == DATA2VEC2:
        raise InputError(
            "alignment.representation: layer_mean needs all layers of the teacher; set teacher.first_blocks=null"
        )


def fitted_width(config: TrainConfig, model: DistillationModel) -> int:
    """Return the width of the embedding to which the run fits an alignment; 0 if the run fits no alignment."""
    is_fitted = config.alignment.max_samples > 0 and model.student.alignment is None
    return model.teacher.embedding.width if is_fitted else 0


def build_alignment(config: TrainConfig, model: DistillationModel, samples: Samples | None) -> AlignStudent | None:
    """Build the callback that fits the student's alignment; ``None`` if the run fits no alignment."""
    if samples is None or not fitted_width(config, model):
        return None
    chosen = evenly_spaced(len(samples), config.alignment.max_samples)
    align = AlignStudent(
        model,
        Subset(samples, chosen),  # pyright: ignore[reportArgumentType]: torch's class takes any samples by number
        device_batch_size=config.device_eval_batch_size,
        workers=config.train_loader.num_workers,
    )
    if (count := align.batches.size) < MIN_PAIRS:
        raise InputError(
            f"alignment.max_samples: an alignment needs at least {MIN_PAIRS} training samples, got {count} in whole "
            f"batches of {align.batches.shape[1]}; for no alignment, set alignment.max_samples to 0"
        )
    return align


def open_alignment_samples(config: TrainConfig, index: Index) -> Source:
    """Open the training samples to which the alignment is fitted: at most ``alignment.max_samples``."""
    numbers = choose_alignment_samples(index, config.seed, config.alignment.max_samples, config.device_eval_batch_size)
    return open_mds(index, config.train_loader.cache_limit).select(numbers.ravel())


def build_retrieval(
    config: TrainConfig, model: DistillationModel, align: AlignStudent | None, stop: Stop
) -> ZeroShotRetrieval | None:
    """Build the callback of the section ``retrieval``; ``None`` if the section has no data sets."""
    retrieval = config.retrieval
    if not any(retrieval.datasets.values()):
        return None
    headline, student, baselines = choose_embeds(config, model)
    modality = modality_of(model.teacher.config)
    with node_leaders_first("the data sets for retrieval"):
        datasets = build_labeled_sets(retrieval, modality, (model.teacher if align else model.student).embedding)
    with errors_of("retrieval"):
        return ZeroShotRetrieval(
            datasets,
            retrieval.interval,
            retrieval.ks,
            embed=student,
            headline=headline,
            all_embeddings=retrieval.embeddings == "all",
            baselines=baselines,
            at_start=retrieval.at_start,
            probes=retrieval.probes,
            augment=build_augmentation(config.train_loader, modality, config.seed, for_views=True),
            align=align,
            models={STUDENT: model.student, TEACHER: model.teacher},
            should_stop=stop.ends_retrieval,
            device_batch_size=config.device_eval_batch_size,
            progress_bar=config.progress_bar,
        )


def choose_embeds(config: TrainConfig, model: DistillationModel) -> tuple[str, Embed, dict[str, Embed]]:
    """Return the name of the embedding that tables show, and the embed functions of the student and the baselines."""
    retrieval = config.retrieval
    with errors_of("retrieval"):
        headline = model.student.choose_embedding(retrieval.pooling, retrieval.representation)
    known = embeds_of(config, model)
    student, encoder = known.pop(STUDENT), known.get("encoder")
    if unknown := [name for name in retrieval.baselines if name not in known]:
        raise InputError(f"retrieval.baselines: this teacher allows only {', '.join(known)}; got {unknown[0]!r}")
    if encoder is not None and model.student.encoder is not model.teacher.encoder:
        del known["encoder"]  # it is no part of the student
    return headline, student, {name: known[name] for name in retrieval.baselines if name in known}


def embeds_of(config: TrainConfig, model: DistillationModel) -> dict[str, Embed]:
    """Return the functions with which the baselines and the student embed a batch, by name."""
    models = {TEACHER: model.teacher, STUDENT: model.student}
    fill_to = config.device_eval_batch_size if config.compile else 0
    shared = share_encoders(model.teacher, models, model.student.layer_mean, fill_to)
    return {name: partial(model.compute, embed) for name, embed in shared.items()}
