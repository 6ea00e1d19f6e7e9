"""Load teachers and students from files, and write them."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from d2v_composer.checkpoints.fairseq import load_data2vec2
from d2v_composer.checkpoints.safe_load import fetch_model, is_trained, load_untrusted, read_newest
from d2v_composer.checkpoints.student_file import (
    CONFIG_TENSOR,
    PrimaryEmbedding,
    build_encoder,
    check_fits,
    check_outputs,
    check_same_encoder,
    check_same_teacher,
    check_student,
    config_tensor,
    distillation_of,
    is_safetensors,
    lookup,
    pop_sizes,
    read_model_file,
    sizes_of,
    stored_primary,
    write_model_file,
)
from d2v_composer.models.names import DATA2VEC2, PREFIX, Weights
from d2v_composer.models.sizes import ImageSize, TimmEncoderConfig
from d2v_composer.models.student import Student
from d2v_composer.models.teacher import Teacher
from d2v_composer.system.command_line import d2v
from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import is_remote

Models = tuple[Student | Teacher, Teacher | None]
NAME_IT = "--teacher PATH, or teacher=PATH after a YAML"


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
        path: A local path, https://, or an object store's address (cached until it changes). data2vec 2.0: a .pt of
            fairseq or a file of ``convert_teacher``, which says whether it is of images or audio. timm: a .safetensors
            or PyTorch file; ``None``: timm's pretrained weights, from the Hugging Face hub or its cache.
        weights: For data2vec 2.0: ``model``, or ``ema`` for the moving average. A converted file holds one of the two.
        model: ``data2vec2``, or ``timm/NAME``, NAME as ``timm.create_model`` takes it.
        first_blocks: Blocks in the shared encoder; default: a sixth of a timm model's, those of the modality encoder in
            data2vec 2.0.
        image_size: timm: pixels per side, or height and width: (112, 168) or '112x168'; default timm's for this model.

    Returns:
        A :class:`~d2v_composer.models.teacher.Teacher`; its ``config`` has the sizes, its ``provenance`` the origin.

    Raises:
        InputError: The file does not exist, or is not a supported teacher.

    Example:
        >>> teacher = load_teacher("teacher.safetensors")
        >>> x = teacher.encode(images)  # (B, T, D)
        >>> targets = teacher.targets(x)  # (B, T, D), what a student regresses
    """
    if model.startswith(PREFIX):
        if weights != "model":
            raise InputError(f"weights: {model} has no {weights} weights; use model")
        from d2v_composer.checkpoints.timm_weights import load_timm_teacher  # timm takes seconds to import

        return load_timm_teacher(path, model, first_blocks, image_size)
    if model != DATA2VEC2:
        raise InputError(f"model: must be {DATA2VEC2} or timm/NAME, got {model!r}")
    if path is None:
        raise InputError(f"checkpoint: {DATA2VEC2} needs a file")
    if image_size is not None:
        raise InputError(f"image_size: cannot be set for {DATA2VEC2}, whose file fixes it")
    teacher = load_data2vec2(path, weights)
    if first_blocks is not None:
        try:
            teacher.share_blocks(first_blocks)
        except ValueError as error:
            raise InputError(str(error)) from error
    return teacher


def save_student(student: Student, out: Path) -> None:
    """Write a student with all that :func:`load_student` needs: encoder, blocks, sizes, preprocessing, provenance.

    One with a head is written as a classifier, for timm.
    """
    primary = stored_primary(student.provenance)
    sizes, encoder = sizes_of(student), student.encoder
    if isinstance(encoder.config, TimmEncoderConfig):
        from timm import __version__ as now

        sample: Any = encoder
        now_computed = encoder.config.changed(timm=now, outputs=sample.sample_outputs())
        sizes["encoder"] = now_computed.model_dump(mode="json")
    tensors = student.state_dict() | {CONFIG_TENSOR: config_tensor(sizes, primary)}
    kind = "classifier" if "head.weight" in tensors else "student"
    write_model_file(out, kind, sizes, student.provenance, tensors)


def load_student(path: str | Path) -> Student:
    """Load an exported student; it needs no teacher, checkpoint or YAML.

    Args:
        path: A file of ``d2v export``: a local path, https://, or an object store's address (cached until it changes).

    Returns:
        A :class:`~d2v_composer.models.student.Student` in eval mode and float32: the frozen encoder and the trained
        blocks. :meth:`~d2v_composer.models.backbone.Backbone.embed` computes an embedding; its ``provenance`` is the
        record of the run. On a GPU, torch rounds convolutions to 10 bits unless ``torch.backends.cudnn.allow_tf32`` is
        false; it is left as it is.

    Raises:
        InputError: The file does not exist, or does not hold a student.

    Example:
        >>> student = load_student("student.safetensors")
        >>> embeddings = student.embed(images, pooling="mean")  # (B, 3, height, width) uint8 → (B, D)
        >>> teacher = student.provenance["teacher"]["source"]
    """
    file = fetch_model(path)
    if not is_safetensors(file):
        command = d2v("export", path, "student.safetensors")
        raise InputError(f"{path}: expected an exported student; export a training checkpoint first: {command}")
    stored = read_model_file(file)
    stored.expect(path, "student")
    sizes, _ = pop_sizes(path, stored.tensors)
    encoder_config, student_config = check_student(path, sizes, stored.tensors)
    student = Student(build_encoder(encoder_config), student_config, stored.provenance)
    student.load_state_dict(stored.tensors)
    check_outputs(path, student.encoder)
    return student.eval()


def load_any(
    path: str | Path,
    weights: Weights = "model",
    teacher_path: str | None = None,
    *,
    checkpoint: str | Path | None = None,
    first_blocks: int | None = None,
    image_size: ImageSize | str | None = None,
) -> Models:
    """Load the model of any supported file, and its teacher.

    Args:
        path: A data2vec 2.0 teacher's file, as for :func:`load_teacher`, or ``timm/NAME``; an exported or fine-tuned
            student, or a training checkpoint.
        weights: Weights to take from a teacher's file.
        teacher_path: The student's teacher; for a checkpoint, the default is the path used in training.
        checkpoint, first_blocks, image_size: For ``timm/NAME``, as for :func:`load_teacher`; checkpoint is its path.

    Returns:
        A student and its teacher, ``None`` if it is not known; or a teacher twice.

    Raises:
        InputError: The file is corrupt, or not supported.
    """
    sizes: dict[str, Any] = {"first_blocks": first_blocks, "image_size": image_size}
    if str(path).startswith(PREFIX) and not Path(path).exists():
        model = teacher = load_teacher(checkpoint, weights, model=str(path), **sizes)
    elif given := [name for name, value in {"checkpoint": checkpoint, **sizes}.items() if value is not None]:
        raise InputError(f"{' and '.join(given)}: only for timm/NAME models, got {path}")
    else:

        def load(file: Path) -> Models:
            return _load_file(path, fetch_model(file), weights, teacher_path)

        model, teacher = load(fetch_model(path)) if is_remote(path) else read_newest(Path(path), load)
    if not isinstance(model, Student):
        if teacher_path is not None:
            raise InputError(f"{path}: is not a student, so a teacher ({teacher_path}) is not allowed")
    elif weights != "model":  # the student's record says which its teacher has
        raise InputError(f"weights: {path} is a student, which has no {weights} weights; use model")
    return model, teacher


def _load_file(path: str | Path, file: Path, weights: Weights, teacher_path: str | None) -> Models:
    """Load ``file``, the local copy of ``path``."""
    kind, contents = (read_model_file(file).kind, {}) if is_safetensors(file) else ("", load_untrusted(file))
    if is_trained(contents):
        return _load_checkpoint(file, contents, teacher_path)
    if kind == "student":
        return _with_teacher(load_student(path), teacher_path)
    if not kind and isinstance(contents, dict) and "cfg" not in contents:  # weights without sizes, such as timm's
        raise InputError(
            f"{path}: does not name its model; if it has the weights of a timm model, give timm/NAME as the model and "
            "this file as its checkpoint"
        )
    teacher = load_teacher(path, weights)
    return teacher, teacher


def _with_teacher(student: Student, path: str | None) -> Models:
    """Load the teacher of an exported or fine-tuned student from ``path``; ``None``: no teacher."""
    if path is None:
        return student, None
    record = distillation_of(student.provenance)
    sizes: Any = student.encoder.config
    file, options = path, {"first_blocks": sizes.prenet_depth}
    if isinstance(sizes, TimmEncoderConfig):
        file = None if path == sizes.model else path  # the name of a timm model stands for its pretrained weights
        options |= {"model": sizes.model, "image_size": sizes.image_size}
    teacher = load_teacher(file, lookup(record, "teacher.weights") or "model", **options)
    check_same_teacher(path, teacher, record)
    check_same_encoder(path, teacher.encoder, student.encoder)
    return student, teacher


def _load_checkpoint(path: Path, contents: Any, teacher_path: str | None) -> Models:
    """Load the models in a checkpoint from ``recipes/train.py`` or ``recipes/finetune.py``."""
    try:
        state = contents["state"]
        record, tensors = state["callbacks"]["RunRecord"]["record"], dict(state["model"])
        if "model" in record:
            return _with_teacher(_load_finetuned(path, record, tensors), teacher_path)
        if retrieved := state["callbacks"].get("ZeroShotRetrieval", {}).get("history"):
            baselines = state["callbacks"]["ZeroShotRetrieval"]["baseline_metrics"]
            batch = int(state["timestamp"]["Timestamp"]["batch"])
            results = {"batch": batch, "first": retrieved[0], "last": retrieved[-1], "baselines": baselines}
            record = record | {"results": results}
        return _load_trained(path, record, tensors, teacher_path)
    except InputError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: not a checkpoint written by recipes/train.py ({type(error).__name__}: {error})"
        ) from error


def _load_trained(
    path: Path, record: dict[str, Any], tensors: dict[str, Tensor], teacher_path: str | None
) -> tuple[Student, Teacher]:
    """Load a training run's student, with the run's record as provenance, and its teacher."""
    config = record["config"]
    settings, sizes = config["teacher"], config["student"] | {"init": "random"}
    options = {name: settings[name] for name in ("model", "first_blocks", "image_size")}
    file = None if teacher_path == options["model"] else teacher_path or settings["checkpoint"]
    try:
        teacher = load_teacher(file, settings["weights"], **options)
        check_same_teacher(file or options["model"], teacher, record)
    except InputError as error:
        if teacher_path is not None:
            raise
        raise InputError(f"{error}; if the teacher of {path} has moved, give its new path: {NAME_IT}") from error

    def build() -> Student:
        layer_mean = {name: config["targets"].get(name) for name in ("normalization", "final_layer_norm")}
        return teacher.build_student(**sizes, **layer_mean)

    prefix = "student."  # the others are the objectives' heads
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    check_fits(path, lambda: own_parts(build()), own)
    student = build()
    own_parts(student).load_state_dict(own)
    student.provenance = dict(record)
    return student.eval(), teacher


def own_parts(student: Student) -> nn.ModuleDict:
    """Return a student without its encoder, to load a state dict into."""
    return nn.ModuleDict({name: part for name, part in student.named_children() if name != "encoder"})


def _load_finetuned(path: Path, record: dict[str, Any], tensors: dict[str, Tensor]) -> Student:
    """Load a fine-tuned student with its head, as a timm model; the run's record is its provenance."""
    from d2v_composer.checkpoints.export import TimmStudent  # timm takes seconds to import

    about = record["model"]
    if about["kind"] != "student":
        raise InputError(f"{path}: is a fine-tuned teacher; only a fine-tuned student can be exported or embed images")
    named, sizes = {name.removeprefix("backbone."): each for name, each in tensors.items()}, about["sizes"]
    if "outputs" in sizes["encoder"]:  # an encoder that was trained, too, computes something else
        sizes = sizes | {"encoder": sizes["encoder"] | {"outputs": []}}
    configs = check_student(path, sizes, {name: named[name] for name in named if not name.startswith("head.")})
    student = TimmStudent(*configs, num_classes=len(named["head.bias"]))
    student.load_state_dict(named | {CONFIG_TENSOR: config_tensor(sizes, PrimaryEmbedding.parse(about))})
    student.provenance = record
    return student.eval()


def without_head(student: Student) -> Student:
    """Return a fine-tuned student without its head, on the same encoder and blocks; any other student is unchanged."""
    if type(student) is Student:
        return student
    plain = Student(student.encoder, student.config, student.provenance)
    plain.blocks, plain.input_proj = student.blocks, student.input_proj
    return plain.eval()
