"""Load teachers and students, and write students to files."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from d2v_composer.checkpoints.checkpoint import Checkpoint, fetch_model, read_newest
from d2v_composer.checkpoints.fairseq import load_data2vec2
from d2v_composer.checkpoints.model_file import (
    CONFIG_TENSOR,
    ModelName,
    Tensors,
    build_loaded,
    build_student,
    check_fits,
    check_timm_outputs,
    from_timm,
    is_safetensors,
    new_student,
    read_model_file,
    read_sizes,
    write_model_file,
)
from d2v_composer.checkpoints.safe_load import is_checkpoint, load_untrusted
from d2v_composer.checkpoints.timm_student import convert_to_timm
from d2v_composer.models.backbone import Backbone
from d2v_composer.models.configs import ImageSize, NetworkSizes, StudentSizes, TimmConfig
from d2v_composer.models.names import DATA2VEC2, ENTRY_POINTS, PACKAGE_PREFIX, TIMM_PREFIX, Weights
from d2v_composer.models.provenance import Json, Record, distillation_of, is_teacher_of, value_at
from d2v_composer.models.teacher import Teacher
from d2v_composer.system.entry_points import find_entry_point
from d2v_composer.system.errors import InputError, errors_of
from d2v_composer.system.fetch import is_remote

Models = tuple[Backbone, Teacher | None]

log = logging.getLogger(__name__)


def load_teacher(
    path: str | Path | None,
    weights: Weights = "model",
    *,
    model: str = DATA2VEC2,
    first_blocks: int | None = None,
    image_size: ImageSize | str | None = None,
) -> Teacher:
    """Load a frozen teacher, in eval mode and float32.

    Args:
        path: Path or address of the teacher's file. For ``data2vec2``: a fairseq checkpoint (.pt) or a file that
            ``d2v convert-teacher`` wrote. For ``timm/NAME``: a .safetensors or PyTorch file, or ``None`` for timm's
            pretrained weights from the Hugging Face hub or the local cache. For ``ext/NAME``: what the package takes.
        weights: ``model``; or, for ``data2vec2`` only, ``ema``: the exponential moving average of the weights.
        model: ``data2vec2``, which includes EAT; ``timm/NAME``, with a NAME that ``timm.create_model`` takes; or
            ``ext/NAME``, a teacher that an installed package offers.
        first_blocks: Number of the teacher's first blocks that a student can share; default: for timm, a sixth of the
            model's blocks, rounded; for ``data2vec2``, the number of blocks in the modality encoder.
        image_size: For timm: pixels per side, or height and width as (112, 168) or '112x168'; default: timm's size for
            the model.

    Raises:
        InputError: The teacher cannot be loaded, is not supported, or does not fit an argument.

    Example:
        >>> teacher = load_teacher("teacher.safetensors")
        >>> x = teacher.encode(images)  # (B, 3, height, width) uint8 → (B, T, D)
        >>> targets = teacher.targets(x)  # (B, T, D)
    """
    if model != DATA2VEC2 and weights != "model":
        raise InputError(f"weights: {model} has no {weights} weights; set weights to 'model'")
    if model.startswith(TIMM_PREFIX):
        from d2v_composer.checkpoints.timm_weights import load_timm_teacher  # timm takes seconds to import

        return load_timm_teacher(path, model, first_blocks, image_size)
    if model.startswith(PACKAGE_PREFIX):
        if first_blocks is not None or image_size is not None:
            raise InputError(f"{model}: leave out first_blocks and image_size, which the package of this model fixes")
        return load_external(path, model)
    if model != DATA2VEC2:
        raise InputError(f"model: must be {DATA2VEC2}, timm/NAME or ext/NAME, got {model!r}")
    if path is None:
        raise InputError(f"checkpoint: {DATA2VEC2} needs the path of a file, got null")
    if image_size is not None:
        raise InputError(f"image_size: cannot be set for {DATA2VEC2}, whose file fixes it")
    teacher = load_data2vec2(path, weights)
    if first_blocks is not None:
        try:
            teacher.share_blocks(first_blocks)
        except ValueError as error:
            raise InputError(str(error)) from error
    return teacher


def load_same_teacher(source: str, record: Record, **options: Json) -> Teacher:
    """Load a teacher, and check that the student with this record was distilled from the same teacher."""
    teacher = load_teacher(None if source == options.get("model") else source, **options)
    if not is_teacher_of(record, teacher.provenance):
        found, expected = teacher.provenance["sha256"], value_at(record, "teacher.sha256")
        fault = "its outputs differ" if found == expected else f"expected sha256 {expected}, got {found}"
        raise InputError(f"{source}: not this student's teacher: {fault}")
    return teacher


def load_external(path: str | Path | None, model: str) -> Teacher:
    """Load the teacher ``ext/NAME`` by calling a function of an installed package with ``path``."""
    name = model.removeprefix(PACKAGE_PREFIX)
    with errors_of("model"):
        entry = find_entry_point(ENTRY_POINTS, name)
    if entry is None:
        raise InputError(
            f"model: no installed package provides {model} (entry point {name!r} of the group {ENTRY_POINTS}); install "
            "one, or pass a teacher made in Python: train_student(config, teacher=…)"
        )
    with errors_of(f"model: {model} from {entry.value}"):
        teacher = entry.load()(path)
    if not isinstance(teacher, Teacher):
        raise InputError(f"model: {model}: expected a FrozenModel, got {type(teacher).__name__} from {entry.value}")
    return teacher


def save_student(student: Backbone, out: Path, when_complete: Callable[[], object] = lambda: None) -> None:
    """Write a student's file, which :func:`load_student` and timm can load.

    ``when_complete`` is called when the temporary file is complete, just before it is renamed to ``out``.

    Raises:
        InputError: timm cannot load the student, or would compute other outputs.
        RunError: The file cannot be written.
    """
    kind = "classifier" if isinstance(student.head, nn.Linear) else "student"
    sizes, tensors = convert_to_timm(out, student)
    write_model_file(out, kind, sizes, student.provenance, tensors, when_complete)


def load_student(path: str | Path) -> Backbone:
    """Load an exported student, with its classifier if there is one, in eval mode and float32.

    Args:
        path: Path or address of a file that ``d2v export`` wrote.

    Returns:
        A :class:`~d2v_composer.models.timm_network.TimmStudent` if the student is a whole timm model, else a
        :class:`~d2v_composer.models.student.Student`. Its ``provenance`` is the run's record.

    Raises:
        InputError: The file does not exist or does not hold a student, or the installed timm computes other outputs.

    Example:
        >>> student = load_student("student.safetensors")
        >>> embeddings = student.embed(images)  # (B, 3, height, width) uint8 → (B, P), P channels
        >>> teacher = student.provenance["teacher"]["source"]
    """
    file = fetch_model(path)
    if not is_safetensors(file):
        raise InputError(f"{path}: expected an exported student; export a training checkpoint first, with d2v export")
    stored = read_model_file(file)
    if not (is_classifier := stored.kind == "classifier"):
        stored.expect(path, "student")
    sizes = read_sizes(path, stored.config)
    tensors = {name: tensor for name, tensor in stored.tensors.items() if name != CONFIG_TENSOR}
    if isinstance(sizes, NetworkSizes):
        tensors = from_timm(path, sizes, tensors, is_classifier)
    student = _build_with_head(path, sizes, tensors, stored.provenance)
    check_timm_outputs(path, student)
    return student


def load_models(path: str, weights: Weights = "model", teacher: str | None = None) -> Models:
    """Load the model in any supported file, and its teacher.

    Args:
        path: Path or address of a data2vec 2.0 or EAT teacher, an exported or fine-tuned student, or a training
            checkpoint.
        weights: Argument of :func:`load_teacher`, for a teacher's file.
        teacher: Path or address of the student's teacher. Default: for a checkpoint of a distillation, the teacher
            with which the run trained; otherwise none.

    Returns:
        The student, and its teacher or ``None``; for a teacher's file, the teacher twice.

    Raises:
        InputError: The file is missing, corrupt or not supported; or the teacher at ``teacher``, or a teacher whose
            encoder the student shares, cannot be loaded.
    """

    def load(file: Path) -> Models:
        file = fetch_model(file)
        kind, contents = (read_model_file(file).kind, {}) if is_safetensors(file) else ("", load_untrusted(file))
        if is_checkpoint(contents):
            return _load_checkpoint(Checkpoint(file, contents), teacher)
        if kind in ("student", "classifier"):
            return _with_teacher(load_student(path), teacher)
        if not kind and isinstance(contents, dict) and "cfg" not in contents:  # weights without sizes, such as timm's
            raise InputError(
                f"{path} does not name its model; if it has the weights of a timm model, give timm/NAME as the model "
                "and this file as its checkpoint"
            )
        model = load_teacher(path, weights)
        return model, model

    return load(fetch_model(path)) if is_remote(path) else read_newest(Path(path), load)


def _with_teacher(student: Backbone, path: str | None) -> Models:
    """Return a student, and the teacher from ``path``; ``None`` in place of the teacher if ``path`` is ``None``."""
    if path is None:
        return student, None
    record = distillation_of(student.provenance)
    sizes: Any = student.encoder.config
    has_own = value_at(record, "student.own_encoder")
    settings = value_at(record, "config.teacher") if has_own else dict(sizes) | {"first_blocks": sizes.prenet_depth}
    names = ("first_blocks", "model", "image_size") if has_own or isinstance(sizes, TimmConfig) else ("first_blocks",)
    options: Record = {name: settings[name] for name in names if name in (settings or {})}
    options["weights"] = value_at(record, "teacher.weights") or "model"
    return student, _as_estimated(load_same_teacher(path, record, **options), student)


def _as_estimated(teacher: Teacher | None, student: Backbone) -> Teacher | None:
    """Set the teacher's embedding to the one that the student's alignment estimates.

    Without an alignment, the run's keys ``alignment.pooling`` and ``alignment.representation`` choose the embedding.
    """
    if teacher is not None and student.embedding.made_by == "raw":  # may have another name, such as a timm student's
        chosen: Any = value_at(distillation_of(student.provenance), "config.alignment") or {}
        teacher.use_embedding(chosen.get("pooling"), chosen.get("representation"))
    elif teacher is not None and (of := student.embedding.of) in teacher.raw_names:
        teacher.raw_embedding = of
    return teacher


def _load_checkpoint(checkpoint: Checkpoint, teacher_path: str | None) -> Models:
    """Load the student and the teacher from a checkpoint of a distillation or fine-tuning run."""
    try:
        if "model" in checkpoint.record:
            return _with_teacher(_load_finetuned(checkpoint), teacher_path)
        return _load_trained(checkpoint, teacher_path)
    except InputError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{checkpoint.path} is not a checkpoint of a d2v_composer run ({type(error).__name__}: {error})"
        ) from error


def _load_trained(checkpoint: Checkpoint, teacher_path: str | None) -> Models:
    """Load a distilled student and its teacher; the student's provenance is the run's record and results."""
    path, aligned = checkpoint.path, checkpoint.saved_by("AlignStudent")
    record = checkpoint.record | _results_of(checkpoint)
    sizes = read_sizes(path, record["student"]["sizes"])
    teacher = _load_teacher_of(record, path, teacher_path)
    prefix = "student."  # the others are the objectives' heads
    tensors = {
        name.removeprefix(prefix): tensor for name, tensor in checkpoint.tensors.items() if name.startswith(prefix)
    }
    if teacher is None or record["student"]["own_encoder"]:
        student = build_student(path, sizes, tensors)
    else:
        check_fits(path, lambda: own_parts(new_student(sizes, tensors, encoder=teacher.encoder)), tensors)
        student = new_student(sizes, tensors, encoder=teacher.encoder)
        own_parts(student).load_state_dict(tensors)
    if "weight" in aligned:
        about = aligned["about"]
        student.align(aligned["weight"], aligned["bias"], about["of"], space=about["space"])
        record["alignment"] = about
        if (fitted := aligned["batch"]) != (trained := checkpoint.trained("batch")):
            log.warning(
                "%s: the alignment was fitted at batch %d, but the student's weights are those of batch %d",
                path,
                fitted,
                trained,
            )
    student.provenance = record
    return student.eval(), _as_estimated(teacher, student)


def _results_of(checkpoint: Checkpoint) -> Record:
    """Return the run's last retrieval results as a dict with the key ``results``; {} if the run measured none."""
    saved = checkpoint.saved_by("ZeroShotRetrieval")
    if not saved.get("history"):
        return {}
    accuracies, queries = dict[str, dict[str, float]](), Record()
    for result in saved["results"]:
        rows = accuracies.setdefault(f"{result['dataset']} {result['column']['key']}", {})
        rows[result["row"]] = result["hits"].double().mean().item()
        queries[result["row"]] = {name: result[name] for name in ("weights", "embedding", "info")}
    return {"results": {"accuracies": accuracies, "queries": queries}}


def _load_teacher_of(record: Record, path: Path, teacher_path: str | None) -> Teacher | None:
    """Load a distillation run's teacher, from ``teacher_path`` or, by default, from where the run loaded it.

    Returns:
        The teacher; ``None``, after a warning, if the default fails and the student has its own encoder.
    """
    options = dict(record["config"]["teacher"])
    trained_with, model = options.pop("checkpoint"), options["model"]
    try:
        return load_same_teacher(teacher_path or trained_with or model, record, **options)
    except InputError as error:
        if teacher_path is not None:
            raise
        how = f"if the teacher of {path} has moved, give the new path: --teacher PATH or, with a YAML, teacher=PATH"
        advice = "" if model.startswith(PACKAGE_PREFIX) else f"; {how}"
        if not record["student"]["own_encoder"]:
            raise InputError(f"{error}{advice}") from error
        log.warning("going on without the teacher: %s%s", error, advice)
        return None


def own_parts(student: Backbone) -> nn.ModuleDict:
    """Return the parts of a student that are not frozen: those whose tensors are in a distillation's checkpoint."""
    parts = {name: part for name, part in student.named_children() if not getattr(part, "is_frozen", False)}
    return nn.ModuleDict(parts)


def _load_finetuned(checkpoint: Checkpoint) -> Backbone:
    """Load the student of a fine-tuning run, with its classifier."""
    path, record = checkpoint.path, checkpoint.record
    if record["model"]["kind"] != "student":
        raise InputError(f"{path} is the checkpoint of a fine-tuned teacher; only students' checkpoints can be used")
    tensors = {name.removeprefix("backbone."): tensor for name, tensor in checkpoint.tensors.items()}
    return _build_with_head(path, read_sizes(path, record["model"]["sizes"]), tensors, record)


def _build_with_head(
    path: ModelName, sizes: NetworkSizes | StudentSizes, tensors: Tensors, provenance: Record
) -> Backbone:
    """Build a student, with a classifier if ``tensors`` include a classifier's weights."""
    head = {name.removeprefix("head."): tensor for name, tensor in tensors.items() if name.startswith("head.")}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    student = build_student(path, sizes, tensors, provenance)
    if head:
        student.head = build_loaded(path, lambda: nn.Linear(student.embedding.width, len(head["bias"])), head)
    return student
