"""Load teachers and students from files, and write them."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, overload

from torch import Tensor

from d2v_composer.checkpoints.fairseq import load_data2vec2
from d2v_composer.checkpoints.resume import fetch_model, read_newest
from d2v_composer.checkpoints.safe_load import is_trained, load_untrusted
from d2v_composer.checkpoints.student_file import (
    CONFIG_TENSOR,
    DEFAULT_PRIMARY,
    ModelFile,
    add_outputs,
    build_encoder,
    check_same_encoder,
    check_student,
    check_tensors,
    config_tensor,
    is_safetensors,
    parse_config_tensor,
    parse_primary,
    read_kind,
    read_model_file,
    shapes_of,
    sizes_of,
    stored_primary,
    write_model_file,
)
from d2v_composer.models.data2vec2 import Data2Vec2
from d2v_composer.models.encoder import ImageSize
from d2v_composer.models.names import DATA2VEC2, Weights
from d2v_composer.models.student import Student
from d2v_composer.models.teacher import Teacher
from d2v_composer.models.timm_teacher import PREFIX, TimmEncoderConfig
from d2v_composer.system.command_line import d2v
from d2v_composer.system.errors import InputError, reason
from d2v_composer.system.fetch import is_remote

# MERGED FROM d2v_composer/checkpoints/load.py: Load the student of a checkpoint of ``recipes/finetune.py``, with


def is_finetuned(contents: dict[str, Any]) -> bool:
    """Return whether a Composer checkpoint's run was a fine-tuning."""
    try:
        return "model" in contents["state"]["callbacks"]["RunRecord"]["record"]
    except (LookupError, TypeError):
        return False


def load_finetuned(checkpoint: Path, contents: dict[str, Any]) -> Student:
    """Build a fine-tuned student with its head, as timm's model; the run's record is its provenance.

    Args:
        checkpoint: Named in errors.
        contents: The checkpoint's; no other file is needed.

    Raises:
        InputError: It holds a fine-tuned teacher, or unusable sizes or tensors.
    """
    from d2v_composer.checkpoints.export import POOLINGS, TimmStudent  # timm takes seconds to import

    try:
        record = dict(contents["state"]["callbacks"]["RunRecord"]["record"])
        about, tensors = dict(record["model"]), dict(contents["state"]["model"])
        kind, sizes, (representation, pooling) = about["kind"], about.get("sizes"), parse_primary(about)
        head = {name: each for name, each in tensors.items() if name.startswith("head.")}
        num_classes = int(head["head.bias"].shape[0])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{checkpoint}: not a checkpoint of recipes/finetune.py ({type(error).__name__}: {error})"
        ) from error
    if kind != "student" or sizes is None:
        raise InputError(f"{checkpoint}: is a fine-tuned teacher: only a student can be exported or embedded")
    backbone = {
        name.removeprefix("backbone."): each
        for name, each in tensors.items()
        if name.startswith("backbone.") and isinstance(each, Tensor)
    }
    encoder_config, student_config = check_student(checkpoint, sizes, backbone)
    pool = next(name for name, each in POOLINGS.items() if each == pooling)
    student = TimmStudent(encoder_config, student_config, num_classes, pool, representation)
    student.load_state_dict(backbone | head | {CONFIG_TENSOR: getattr(student, CONFIG_TENSOR)})
    student.provenance = record
    return student.eval()


def without_head(student: Student) -> Student:
    """Return a fine-tuned student without its head, on the same encoder; another student as it is."""
    if type(student) is Student:
        return student
    plain = Student(student.encoder, student.config, student.provenance)
    tensors = student.state_dict()
    plain.load_state_dict({name: tensors[name] for name in plain.state_dict()})
    return plain.eval()


NO_STUDENT = "{}: is not a student, so a teacher ({}) is not allowed"


class TimmWeights(NamedTuple):
    """The weights and sizes of a model timm/NAME, as for :func:`load_teacher`."""

    checkpoint: str | Path | None = None
    first_blocks: int | None = None
    image_size: ImageSize | str | None = None


PRETRAINED = TimmWeights()


@overload
def load_teacher(path: str | Path, weights: Weights = "model", *, first_blocks: int | None = None) -> Data2Vec2: ...


@overload
def load_teacher(
    path: str | Path | None,
    weights: Weights = "model",
    *,
    model: str,
    first_blocks: int | None = None,
    image_size: ImageSize | str | None = None,
    option: Callable[[str], str] = str,
) -> Teacher: ...


def load_teacher(
    path: str | Path | None,
    weights: Weights = "model",
    *,
    model: str = DATA2VEC2,
    first_blocks: int | None = None,
    image_size: ImageSize | str | None = None,
    option: Callable[[str], str] = str,
) -> Teacher:
    """Load a frozen teacher, in eval mode and float32.

    Args:
        path: A local path, https://, or an object store's address (fetched once and cached). Of data2vec 2.0, fairseq's
            .pt or a file of ``convert_teacher``. Of timm, a .safetensors or PyTorch file; ``None``: timm's pretrained
            weights, from the Hugging Face hub or its cache.
        weights: Of data2vec 2.0: ``model``, or ``ema`` for the moving average. A converted file holds one of the two.
        model: ``data2vec2``, or ``timm/NAME``, NAME as ``timm.create_model`` takes it.
        first_blocks: Blocks in the shared encoder; default: of timm a sixth of all, of data2vec 2.0 those of its
            modality encoder.
        image_size: Of timm: pixels a side, or height and width: (112, 168) or '112x168'; default timm's for this model.
        option: The name of one of these arguments → what the user sets it with, for errors.

    Raises:
        InputError: The file does not exist, or is not a supported teacher.
    """
    if model.startswith(PREFIX):
        if weights != "model":
            raise InputError(f"{option('weights')}: {model} has no {weights} weights; allowed here: model")
        from d2v_composer.checkpoints.timm_weights import load_timm_teacher  # timm takes seconds to import

        return load_timm_teacher(path, model, first_blocks, image_size, option)
    if model != DATA2VEC2:
        raise InputError(f"{option('model')}: must be {DATA2VEC2} or timm/NAME, got {model!r}")
    if path is None:
        raise InputError(f"{option('checkpoint')}: {DATA2VEC2} needs a file")
    if image_size is not None:
        raise InputError(f"{option('image_size')} is fixed in the file of {DATA2VEC2}")
    teacher = load_data2vec2(path, weights)
    if first_blocks is not None:
        try:
            teacher.share_blocks(first_blocks)
        except ValueError as error:
            raise InputError(f"{path}: {str(error).replace('first_blocks', option('first_blocks'))}") from error
    return teacher


def save_student(student: Student, out: Path) -> None:
    """Write a student with all that :func:`load_student` needs: encoder, blocks, sizes, preprocessing, provenance.

    One with a head is written as a classifier, for timm.
    """
    primary = stored_primary(student.provenance) or DEFAULT_PRIMARY
    encoder: Any = student.encoder.config
    sizes = sizes_of(student) | {"encoder": asdict(add_outputs(encoder, student.encoder.state_dict()))}
    tensors = student.state_dict() | {CONFIG_TENSOR: config_tensor(sizes, primary)}
    kind = "classifier" if "head.weight" in tensors else "student"
    write_model_file(out, kind, ModelFile(sizes, student.provenance, tensors))


def load_student(path: str | Path) -> Student:
    """Load a student, in eval mode and float32, from a file of :func:`save_student`; no teacher is needed.

    Raises:
        InputError: The file does not exist, or does not hold a student.
    """
    file = fetch_model(path)
    if not is_safetensors(file):
        _refuse_checkpoint(path, file)
    stored = read_model_file(file, "student")
    sizes_for_timm = stored.tensors.pop(CONFIG_TENSOR, None)
    encoder_config, student_config = check_student(path, stored.config, stored.tensors)
    if sizes_for_timm is not None:
        try:
            agree = parse_config_tensor(sizes_for_timm).sizes == stored.config
        except ValueError as error:
            raise InputError(f"{path}: tensor {CONFIG_TENSOR}: unusable sizes ({reason(error)})") from error
        if not agree:
            raise InputError(f"{path}: its metadata and its tensor {CONFIG_TENSOR} give different sizes")
    student = Student(build_encoder(encoder_config), student_config, stored.provenance)
    student.load_state_dict(stored.tensors)
    return student.eval()


def _refuse_checkpoint(path: str | Path, file: Path) -> None:
    """Refuse a training checkpoint, or a teacher's, in place of an exported student."""
    contents: Any = None
    with suppress(InputError):  # neither of them
        contents = load_untrusted(file)
    if is_trained(contents):
        command = d2v("export", path, "student.safetensors")
        raise InputError(f"{path}: is a training checkpoint: export its student first: {command}")
    if isinstance(contents, dict) and "model" in contents:
        raise InputError(f"{path}: is a teacher's checkpoint, read by load_teacher; expected an exported student")


def load_any(
    path: str | Path,
    weights: Weights = "model",
    teacher_path: str | None = None,
    teacher_option: str = "--teacher PATH",
    timm_weights: TimmWeights = PRETRAINED,
    option: Callable[[str], str] = str,
) -> tuple[Student | None, Teacher | None]:
    """Load the student and the teacher of any supported file.

    Args:
        path: A data2vec 2.0 teacher's file, as for :func:`load_teacher`, or ``timm/NAME``: no student. An exported
            or fine-tuned student's: a teacher only with ``teacher_path``. A training checkpoint: both.
        weights: Of a teacher's file.
        teacher_path: The student's teacher; for a checkpoint, the default is the path used in training.
        teacher_option: What the user sets ``teacher_path`` with, named if that path holds no teacher any more.
        timm_weights: Of ``timm/NAME``; default: timm's pretrained ones.
        option: As for :func:`load_teacher`.

    Raises:
        InputError: The file is corrupt, or not supported.
    """

    def load(file: Path) -> tuple[Student | None, Teacher | None]:
        student, teacher = _load_file(path, fetch_model(file), weights, teacher_path, teacher_option)
        if student is not None and teacher is not None:
            teacher.normalization = student.normalization  # so that their embeddings compare
        return student, teacher

    if str(path).startswith(PREFIX) and not Path(path).exists():
        if teacher_path is not None:
            raise InputError(NO_STUDENT.format(path, teacher_path))
        file, first_blocks, image_size = timm_weights
        sizes: dict[str, Any] = {"first_blocks": first_blocks, "image_size": image_size}
        return None, load_teacher(file, weights, model=str(path), **sizes, option=option)
    if given := [option(name) for name, value in timm_weights._asdict().items() if value is not None]:
        raise InputError(f"{' and '.join(given)}: only for a model timm/NAME, got {path}")
    return load(fetch_model(path)) if is_remote(path) else read_newest(Path(path), load)


def _load_file(
    path: str | Path, file: Path, weights: Weights, teacher_path: str | None, teacher_option: str
) -> tuple[Student | None, Teacher | None]:
    """Load ``file``, the local copy of ``path``."""
    contents = None if is_safetensors(file) else load_untrusted(file)
    student = None
    if contents is None and read_kind(file) == "student":
        student = load_student(path)
    elif is_trained(contents) and is_finetuned(contents):
        student = load_finetuned(file, contents)
    if student is not None:
        return student, None if teacher_path is None else _load_teacher_of(student, teacher_path, weights)
    if is_trained(contents):
        return _load_trained(file, contents, teacher_path, teacher_option)
    if teacher_path is not None:
        raise InputError(NO_STUDENT.format(path, teacher_path))
    _refuse_bare_weights(path, file, contents)
    return None, load_teacher(path, weights)


def _refuse_bare_weights(path: str | Path, file: Path, contents: Any) -> None:
    """Refuse weights without sizes, such as timm's: the model must be named."""
    is_bare = read_kind(file) == "none" if contents is None else isinstance(contents, dict) and "cfg" not in contents
    if is_bare:
        raise InputError(
            f"{path}: does not name its model; if it has the weights of one of timm's, give timm/NAME as the model and "
            "this file as its checkpoint"
        )


def _load_teacher_of(student: Student, path: str, weights: Weights) -> Teacher:
    """Load the teacher of an exported or fine-tuned student."""
    sizes: Any = student.encoder.config
    file, options = path, {"first_blocks": sizes.prenet_depth}
    if isinstance(sizes, TimmEncoderConfig):
        file, options = _file_of(path, sizes.model), options | {"model": sizes.model, "image_size": sizes.image_size}
    teacher = load_teacher(file, weights, **options)
    check_same_encoder(path, teacher.encoder, student.encoder)
    return teacher


def _file_of(path: str, model: str) -> str | None:
    """Return the file of a teacher of a student; a timm model's name stands for its pretrained weights."""
    return None if path == model and model.startswith(PREFIX) else path


def _load_trained(
    checkpoint: Path, contents: dict[str, Any], teacher_path: str | None, teacher_option: str
) -> tuple[Student, Teacher]:
    """Build a training checkpoint's student, with its run's record as provenance, and load the training's teacher."""
    foreign = f"{checkpoint}: not a checkpoint of recipes/train.py"
    try:
        tensors, callbacks = dict(contents["state"]["model"]), dict(contents["state"]["callbacks"])
        record = dict(callbacks["RunRecord"]["record"])
        settings, trained_with = dict(record["config"]["teacher"]), record["teacher"]["sha256"]
        teacher_file, weights = settings["checkpoint"], settings["weights"]
        options: dict[str, Any] = {name: settings.get(name) for name in ("first_blocks", "image_size")}  # not in 0.1.0
        model = str(settings.get("model", DATA2VEC2))
        normalization = dict(record["config"].get("targets", {})).get("normalization", "instance")
        sizes: dict[str, Any] = {**record["config"]["student"], "init": "random", "normalization": normalization}
        history = list(callbacks.get("ZeroShotRetrieval", {}).get("history", []))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{foreign} ({type(error).__name__}: {error})") from error
    teacher_file = _file_of(teacher_path, model) if teacher_path else teacher_file and str(teacher_file)
    try:
        teacher = load_teacher(teacher_file, weights, model=model, **options)
        if (found := teacher.provenance["sha256"]) != trained_with:
            name = teacher_file or model
            raise InputError(f"{name}: its sha256 is {found}, the student was trained with {trained_with}")
    except InputError as error:
        if teacher_path is not None:
            raise
        raise InputError(
            f"{error}; if the teacher of {checkpoint} has moved, name its file: {teacher_option}"
        ) from error
    blocks = {
        str(name).removeprefix("student."): tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)
    }
    try:
        shapes = shapes_of(lambda: teacher.build_student(**sizes))
    except (TypeError, ValueError) as error:
        raise InputError(f"{foreign} ({reason(error)})") from error
    expected = {name: shape for name, shape in shapes.items() if not name.startswith("encoder.")}
    check_tensors(checkpoint, expected, blocks)
    student = teacher.build_student(**sizes)
    student.load_state_dict(blocks, strict=False)
    student.provenance = {**record, "retrieval": history[-1] if history else None}
    return student.eval(), teacher
