"""Load teachers and students from files, and write them."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from d2v_composer.checkpoints.fairseq import load_data2vec2
from d2v_composer.checkpoints.safe_load import fetch_model, is_trained, load_untrusted, read_newest
from d2v_composer.checkpoints.student_file import (
    CONFIG_TENSOR,
    DEFAULT_PRIMARY,
    PrimaryEmbedding,
    build_encoder,
    check_fits,
    check_outputs,
    check_same_encoder,
    check_student,
    config_tensor,
    is_safetensors,
    pop_sizes,
    read_model_file,
    sizes_of,
    stored_primary,
    write_model_file,
)
from d2v_composer.models.encoder import ImageSize
from d2v_composer.models.names import DATA2VEC2, PREFIX, Weights
from d2v_composer.models.student import Student
from d2v_composer.models.teacher import Teacher
from d2v_composer.models.timm_config import TimmEncoderConfig
from d2v_composer.system.command_line import d2v
from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import is_remote


class TimmWeights(NamedTuple):
    """The weights and sizes of a model timm/NAME, as for :func:`load_teacher`."""

    checkpoint: str | Path | None = None
    first_blocks: int | None = None
    image_size: ImageSize | str | None = None


PRETRAINED = TimmWeights()


class Loaded(NamedTuple):
    """The models of a file."""

    student: Student | None
    """Fine-tuned, it has a head."""
    teacher: Teacher | None

    @property
    def model(self) -> Student | Teacher:
        """The student, or a teacher from its own file."""
        model: Any = self.teacher if self.student is None else self.student  # every file has one of them
        return model


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
        path: A local path, https://, or an object store's address (fetched once and cached). data2vec 2.0: a .pt of
            fairseq or a file of ``convert_teacher``. timm: a .safetensors or PyTorch file; ``None``: timm's pretrained
            weights, from the Hugging Face hub or its cache.
        weights: For data2vec 2.0: ``model``, or ``ema`` for the moving average. A converted file holds one of the two.
        model: ``data2vec2``, or ``timm/NAME``, NAME as ``timm.create_model`` takes it.
        first_blocks: Blocks in the shared encoder; default: a sixth of a timm model's, those of the modality encoder in
            data2vec 2.0.
        image_size: timm: pixels per side, or height and width: (112, 168) or '112x168'; default timm's for this model.
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
    sizes, encoder = sizes_of(student), student.encoder
    if isinstance(encoder.config, TimmEncoderConfig):
        from timm import __version__ as now

        sample: Any = encoder
        sizes["encoder"] = asdict(replace(encoder.config, timm=now, outputs=sample.sample_outputs()))
    tensors = student.state_dict() | {CONFIG_TENSOR: config_tensor(sizes, primary)}
    kind = "classifier" if "head.weight" in tensors else "student"
    write_model_file(out, kind, sizes, student.provenance, tensors)


def load_student(path: str | Path) -> Student:
    """Load a student, in eval mode and float32, from a file of :func:`save_student`; no teacher is needed.

    Raises:
        InputError: The file does not exist, or does not hold a student.
    """
    file = fetch_model(path)
    if not is_safetensors(file):
        command = d2v("export", path, "student.safetensors")
        raise InputError(f"{path}: expected an exported student; export that of a training checkpoint first: {command}")
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
    teacher_option: str = "--teacher PATH",
    timm_weights: TimmWeights = PRETRAINED,
    option: Callable[[str], str] = str,
) -> Loaded:
    """Load the student and the teacher of any supported file.

    Args:
        path: A data2vec 2.0 teacher's file, as for :func:`load_teacher`, or ``timm/NAME``: no student. An exported
            or fine-tuned student's: a teacher only with ``teacher_path``. A training checkpoint: both.
        weights: Weights to take from a teacher's file.
        teacher_path: The student's teacher; for a checkpoint, the default is the path used in training.
        teacher_option: What the user sets ``teacher_path`` with, named if that path no longer holds the teacher.
        timm_weights: Weights of ``timm/NAME``; default: timm's pretrained ones.
        option: As for :func:`load_teacher`.

    Raises:
        InputError: The file is corrupt, or not supported.
    """
    if str(path).startswith(PREFIX) and not Path(path).exists():
        checkpoint, first_blocks, image_size = timm_weights
        sizes: dict[str, Any] = {"first_blocks": first_blocks, "image_size": image_size}
        loaded = Loaded(None, load_teacher(checkpoint, weights, model=str(path), **sizes, option=option))
    elif given := [option(name) for name, value in timm_weights._asdict().items() if value is not None]:
        raise InputError(f"{' and '.join(given)}: only for a model timm/NAME, got {path}")
    else:

        def load(file: Path) -> Loaded:
            return _load_file(path, fetch_model(file), weights, teacher_path, teacher_option)

        loaded = load(fetch_model(path)) if is_remote(path) else read_newest(Path(path), load)
    student, teacher = loaded
    if student is None and teacher_path is not None:
        raise InputError(f"{path}: is not a student, so a teacher ({teacher_path}) is not allowed")
    if student is not None and teacher is not None:
        teacher.normalization = student.normalization  # so that their embeddings compare
    return loaded


def _load_file(path: str | Path, file: Path, weights: Weights, teacher_path: str | None, teacher_option: str) -> Loaded:
    """Load ``file``, the local copy of ``path``."""
    kind, contents = (read_model_file(file).kind, {}) if is_safetensors(file) else ("", load_untrusted(file))
    if is_trained(contents):
        return _load_checkpoint(file, contents, weights, teacher_path, teacher_option)
    if kind == "student":
        return _with_teacher(load_student(path), teacher_path, weights)
    if not kind and isinstance(contents, dict) and "cfg" not in contents:  # weights without sizes, such as timm's
        raise InputError(
            f"{path}: does not name its model; if it has the weights of a timm model, give timm/NAME as the model and "
            "this file as its checkpoint"
        )
    return Loaded(None, load_teacher(path, weights))


def _with_teacher(student: Student, path: str | None, weights: Weights) -> Loaded:
    """Load the teacher of an exported or fine-tuned student from ``path``; ``None``: no teacher."""
    if path is None:
        return Loaded(student, None)
    sizes: Any = student.encoder.config
    file, options = path, {"first_blocks": sizes.prenet_depth}
    if isinstance(sizes, TimmEncoderConfig):
        file = None if path == sizes.model else path  # the name of a timm model stands for its pretrained weights
        options |= {"model": sizes.model, "image_size": sizes.image_size}
    teacher = load_teacher(file, weights, **options)
    check_same_encoder(path, teacher.encoder, student.encoder)
    return Loaded(student, teacher)


def _load_checkpoint(
    path: Path, contents: Any, weights: Weights, teacher_path: str | None, teacher_option: str
) -> Loaded:
    """Load the models of a checkpoint of ``recipes/train.py`` or ``recipes/finetune.py``."""
    try:
        callbacks, tensors = contents["state"]["callbacks"], dict(contents["state"]["model"])
        record = callbacks["RunRecord"]["record"]
        if "model" in record:
            return _with_teacher(_load_finetuned(path, record, tensors), teacher_path, weights)
        loaded = _load_trained(path, record, tensors, teacher_path, teacher_option)
        loaded.model.provenance["retrieval"] = (callbacks.get("ZeroShotRetrieval", {}).get("history") or [None])[-1]
        return loaded
    except InputError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a checkpoint of recipes/train.py ({type(error).__name__}: {error})") from error


def _load_trained(
    path: Path, record: dict[str, Any], tensors: dict[str, Tensor], teacher_path: str | None, teacher_option: str
) -> Loaded:
    """Load a training run's student, with the run's record as provenance, and its teacher."""
    config = record["config"]
    settings, sizes = config["teacher"], config["student"] | {"init": "random"}
    options = {name: settings[name] for name in ("model", "first_blocks", "image_size")}
    file = None if teacher_path == options["model"] else teacher_path or settings["checkpoint"]
    try:
        teacher = load_teacher(file, settings["weights"], **options)
        if (found := teacher.provenance["sha256"]) != (expected := record["teacher"]["sha256"]):
            raise InputError(f"{file or options['model']}: its sha256 is {found}, the student's teacher has {expected}")
    except InputError as error:
        if teacher_path is not None:
            raise
        raise InputError(f"{error}; if the teacher of {path} has moved, name its file: {teacher_option}") from error

    def build() -> Student:
        return teacher.build_student(**sizes, normalization=config["targets"]["normalization"])

    blocks = {name.removeprefix("student.blocks."): tensor for name, tensor in tensors.items()}
    check_fits(path, lambda: build().blocks, blocks)
    student = build()
    student.blocks.load_state_dict(blocks)
    student.provenance = dict(record)
    return Loaded(student.eval(), teacher)


def _load_finetuned(path: Path, record: dict[str, Any], tensors: dict[str, Tensor]) -> Student:
    """Load a fine-tuned student with its head, as timm's model; the run's record is its provenance."""
    from d2v_composer.checkpoints.export import TimmStudent  # timm takes seconds to import

    about = record["model"]
    if about["kind"] != "student":
        raise InputError(f"{path}: is a fine-tuned teacher: only a student can be exported or embedded")
    named, sizes = {name.removeprefix("backbone."): each for name, each in tensors.items()}, about["sizes"]
    if "outputs" in sizes["encoder"]:  # an encoder that was trained, too, computes something else
        sizes = sizes | {"encoder": sizes["encoder"] | {"outputs": []}}
    configs = check_student(path, sizes, {name: named[name] for name in named if not name.startswith("head.")})
    student = TimmStudent(*configs, num_classes=len(named["head.bias"]))
    student.load_state_dict(named | {CONFIG_TENSOR: config_tensor(sizes, PrimaryEmbedding.parse(about))})
    student.provenance = record
    return student.eval()


def without_head(student: Student) -> Student:
    """Return a fine-tuned student without its head, on the same encoder and blocks; another student as it is."""
    if type(student) is Student:
        return student
    plain = Student(student.encoder, student.config, student.provenance)
    plain.blocks = student.blocks
    return plain.eval()
