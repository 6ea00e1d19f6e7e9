"""Fields of the YAMLs for distillation and evaluation, with their limits, defaults and descriptions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ByteSize, Field, ValidationInfo, create_model, model_validator
from typing_extensions import Self

from d2v_composer.config.choices import CALLBACKS, LOGGERS, OPTIMIZERS, about
from d2v_composer.config.reference import ModelReference, TimmSizes
from d2v_composer.config.resume import FIXED, NEW_RESULT
from d2v_composer.config.types import (
    IS_MODE,
    IS_TEACHER,
    AddressText,
    Arguments,
    Batches,
    Beta,
    Count,
    Duration,
    FoundAddress,
    Fraction,
    LocalFolder,
    Microbatch,
    PathText,
    Positive,
    PrefetchFactor,
    Range,
    Text,
    WarmUp,
    Whole,
    arguments_of,
    check_file,
    checked,
    must,
)
from d2v_composer.evaluation.metrics import PROBES
from d2v_composer.evaluation.rows import ROWS
from d2v_composer.models.alignment import MIN_PAIRS
from d2v_composer.models.configs import STRICT, BlockSizes
from d2v_composer.models.names import (
    DATA2VEC2,
    TIMM_PREFIX,
    Pooling,
    PrecisionChoice,
    Representation,
    Weights,
)
from d2v_composer.models.precision import check_precision, has_gpu
from d2v_composer.models.student import Init
from d2v_composer.objectives import OBJECTIVES
from d2v_composer.sources import FORMAT, FORMATS, LOCAL
from d2v_composer.sources.mds import is_mds
from d2v_composer.system.addresses import RunFolder, check_run_name, place_to_write
from d2v_composer.system.processes import num_nodes, num_ranks

BASELINES = tuple(title for title, row in ROWS.items() if not row.changes_in_training)
PROBE_NAMES = tuple(metric.name for metric in PROBES)
PROBES_ABOUT = "Further metrics, computed on the test samples: " + "; ".join(
    f"``{metric.name}`` {metric.about}{'' if 'labels' in metric.needs else ' (needs no labels)'}" for metric in PROBES
)

# Context in which a config is validated if its training samples must be there.
NEEDS_DATA = "needs data"


class Section(BaseModel):
    """A section of a YAML, in which unknown keys, values of a wrong type and non-finite numbers are errors."""

    model_config = STRICT

    def contradictions(self) -> Iterator[str]:
        """Yield '.key: problem' for each problem that the limits of single fields do not exclude."""
        yield from ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if lines := list(self.contradictions()):
            raise ValueError("\n".join(lines))
        return self


SupportedPrecision = Annotated[PrecisionChoice, checked(check_precision)]


class TeacherSection(TimmSizes, Section):
    """The frozen teacher."""

    model: Annotated[Text, IS_TEACHER] = DATA2VEC2
    """``data2vec2``, for a data2vec 2.0 or EAT model; ``timm/NAME``, for a ViT that ``timm.create_model`` can build; or
    ``ext/NAME``, for a teacher from an installed package or from your Python program."""
    checkpoint: FoundAddress | None
    """Path or address of the weights. For data2vec2, a .pt file of fairseq or a .safetensors file of ``d2v
    convert-teacher``; for timm/NAME, a .safetensors or PyTorch file, or null for timm's pretrained weights from the
    Hugging Face hub; for ext/NAME, what its package takes."""
    weights: Weights = "model"
    """Weights to take from a data2vec 2.0 file: ``model``, as trained, or ``ema``, their moving average."""


class StudentOptions(BlockSizes, Section):
    """The student, as arguments of ``Teacher.build_student``."""

    model: Annotated[Text, must("be timm/NAME", lambda name: name.startswith(TIMM_PREFIX))] | None = None
    """null: the student is new blocks on the teacher's encoder. timm/NAME: the student is this timm model, and the
    section's other fields, except ``pretrained``, must keep their defaults."""
    pretrained: bool = False
    """Load timm's pretrained weights of a timm/NAME student from the Hugging Face hub, and start from them."""

    init: Init = "random"
    """Initial weights of the student's blocks. ``random``: random weights. ``teacher_attention``: random weights,
    except that attention layers are copies of the teacher's. ``teacher_blocks``: copies of the teacher's blocks."""
    freeze_copied: bool = False
    """Freeze the attention layers that ``init: teacher_attention`` copies."""


class Objectives(Section):
    """The terms of the loss."""

    def contradictions(self) -> Iterator[str]:
        if not any(term.weight for _, term in self):
            yield ".tokens.weight: must be positive unless another objective has a positive weight, got 0"


SECTIONS: Any = {name: (objective.Options, objective.Options()) for name, objective in OBJECTIVES.items()}
ObjectivesConfig = create_model("ObjectivesConfig", __base__=Objectives, __doc__=Objectives.__doc__, **SECTIONS)


class LoaderConfig(Section):
    """Loading and augmentation of the training samples."""

    num_workers: Annotated[int, Field(ge=0, le=1000)] = 8
    """Number of processes per device that load samples; 0: the training process loads the samples."""
    prefetch_factor: PrefetchFactor = 2
    """Number of batches that each worker prepares ahead."""
    flip: Annotated[Fraction, NEW_RESULT] = 0.5
    """Probability that an image is flipped horizontally."""

    def faults(self, batch_size: int) -> Iterator[str]:
        """Yield '.key: problem' for each value that does not fit a run with this global batch size."""
        yield from ()


class ShardLoaderConfig(LoaderConfig):
    """Loading and augmentation of training samples in MDS shards."""

    crop_scale: Annotated[Range, must("be at most 1", lambda scale: scale[1] <= 1), NEW_RESULT] = (0.08, 1.0)
    """Smallest and largest area of a random crop, as a fraction of the image's area."""
    crop_ratio: Annotated[Range, NEW_RESULT] = (3 / 4, 4 / 3)
    """Smallest and largest ratio of width to height of a random crop."""
    # The order of clips is by their length in a batch.
    crop_seconds: Annotated[float, Field(ge=0.045, le=3600), FIXED] = 15.6
    """Largest length of an audio clip, in seconds; of a longer clip, a random span of this length is used."""
    remote: AddressText | None = None
    """Address of the MDS data set in an object store (s3://, gs://, …); null: the data set is in a local folder."""
    timeout: Annotated[float, Field(ge=1, le=1e6)] = 600.0
    """Seconds during which an unreachable store is retried before the run fails."""
    shuffle: Annotated[bool, FIXED] = True
    """Shuffle the samples in every epoch, with Streaming's py1e algorithm."""
    shuffle_block_size: Annotated[Count, FIXED] = 1 << 16
    """Approximate number of samples that are shuffled with each other."""
    num_canonical_nodes: Annotated[Count, FIXED] = 1
    """Number of equal parts into which the order of the samples is cut. On several nodes, set a multiple of the number
    of nodes."""
    cache_limit: Annotated[ByteSize, Field(ge=1), AfterValidator(int)] | None = None
    """Largest size of the cache of a remote data set, as a number of bytes or as text such as '100gb'; null: no
    limit."""

    def faults(self, batch_size: int) -> Iterator[str]:
        if batch_size % (parts := self.num_canonical_nodes):  # each part gives whole samples to a batch
            yield f".num_canonical_nodes: must divide global_train_batch_size {batch_size}, got {parts}"
        # A node caches its shards, so it must read the same samples in every epoch.
        if self.remote is not None and parts % (nodes := num_nodes()):
            yield f".num_canonical_nodes: must be divisible by the number of nodes, {nodes}; got {parts}"


class TrainLoaderConfig(ShardLoaderConfig):
    """The training samples."""

    local: LocalFolder
    """Folder of the MDS data set; with ``remote``, folder of its cache."""
    column: Annotated[Text | None, FIXED] = None
    """Name of the column that holds the samples; null: ``image`` or ``audio``."""

    def find_missing_data(self) -> str | None:
        """Return '.key: problem' if ``local`` has no MDS data set and ``remote`` is ``None``; otherwise ``None``."""
        if self.remote is not None or is_mds(Path(self.local)):
            return None
        return (
            f".remote: must be the address of an MDS data set, such as s3://BUCKET/imagenet/train, unless "
            f"train_loader.local is an MDS data set; {self.local} is not. The YAMLs for ImageNet take the address from "
            "the environment variable IMAGENET"
        )

    @model_validator(mode="after")
    def _check_data(self, info: ValidationInfo) -> Self:
        if info.context == NEEDS_DATA and (problem := self.find_missing_data()) is not None:
            raise ValueError(problem)
        return self


class OptimizerConfig(Section):
    """The optimizer."""

    name: Annotated[Text, must(f"be one of {', '.join(OPTIMIZERS)}", OPTIMIZERS.__contains__)] = "adamw"
    """``adamw``: torch.optim.AdamW with its fused kernel. ``decoupled_adamw``: Composer's DecoupledAdamW."""
    lr: Positive = 5e-4
    """Learning rate at the end of the warm-up."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.98)
    """Decay rates of the running means of the gradient and of its square."""
    eps: Positive = 1e-6
    """Small number that is added to the denominator of each update."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay. Each step multiplies the weights by 1 - learning rate · weight_decay; for ``decoupled_adamw``, the
    learning rate in this factor is divided by the learning rate at the end of the warm-up."""
    decay_norms_and_biases: bool = False
    """Also decay biases and the weights of norms."""


class SchedulerConfig(Section):
    """The learning rate over the run."""

    name: Literal["cosine_with_warmup"] = "cosine_with_warmup"
    """``cosine_with_warmup``: Composer's CosineAnnealingWithWarmupScheduler."""
    t_warmup: WarmUp = "3000ba"
    """Length of the linear warm-up, in batches ('5ba'), in epochs ('5ep') or as a fraction of the run ('0.1dur')."""
    alpha_f: Fraction = 0.0
    """Learning rate at the end of the run, as a fraction of ``lr``."""


class GradientClippingConfig(Section):
    clipping_threshold: Positive = 2.0
    """Largest global norm of the gradient."""


class AlgorithmsConfig(Section):
    """Composer's algorithms. {} turns an algorithm on with its default arguments, null turns the algorithm off."""

    gradient_clipping: GradientClippingConfig | None = GradientClippingConfig()
    """Clip the gradient by its global norm."""


class LabeledSetConfig(Section):
    """A data set for measurements of embeddings."""

    format: Annotated[Literal[FORMATS] | None, Field(description=FORMAT)] = None  # pyright: ignore[reportInvalidTypeForm]
    root: AddressText
    """Path or address of the data set. CIFAR: the folder with torchvision's files. speech_commands: the unpacked
    speech_commands_v0.02.tar.gz. Other data sets: a folder with MDS shards or class folders in ROOT/train and
    ROOT/test, or a SOURCE of ``d2v embed`` with paths that contain the names of the splits, train and test or train and
    validation. Without labels, a data set needs no splits."""
    download: bool = False
    """Download CIFAR's files to ``root`` if ``root`` lacks them."""
    column: Annotated[Text | None, FIXED] = None
    """Name of the column that holds the samples; null: ``image`` or ``audio`` in MDS, elsewhere the only column that
    can hold samples."""
    label_column: Annotated[Text | None, FIXED] = "label"
    """Name of the column that holds the labels; in tars, ``cls`` or ``json:KEY``. If each class has its own folder, the
    folders are the labels. null: do not read labels, and measure only probes that need no labels."""
    class_embeddings: PathText | None = None
    """Path of a .npy file for the probe ``zero_shot``: a text tower's embedding of each class, (classes, channels)
    float, in the data set's class order."""

    def contradictions(self) -> Iterator[str]:
        if self.format in LOCAL and "://" in self.root:
            yield f".root: must be a folder on this machine if format is {self.format}, got {self.root!r}"


class AlignmentConfig(Section):
    """A linear map, fitted in closed form, from the student's pooled features to the teacher's embedding."""

    max_samples: Annotated[Whole, must(f"be 0, or at least {MIN_PAIRS}", lambda n: n == 0 or n >= MIN_PAIRS)] = 20000
    """Maximum number of training samples to which the alignment is fitted; 0: fit no alignment."""
    pooling: Annotated[Pooling | None, FIXED] = None
    """Pooling of the teacher's embedding that the student estimates: ``cls``, ``mean`` of all tokens, or
    ``mean_patches``; null: the teacher's default."""
    representation: Annotated[Representation | None, FIXED] = None
    """Representation of the teacher's embedding that the student estimates: ``output`` of the last block, or
    ``layer_mean``, the mean of the blocks' normalized FFN outputs; null: the teacher's default."""


class LookupConfig(Section):
    """Measurements of embeddings, during training or in an evaluation."""

    ks: Annotated[list[Count], Field(min_length=1)] = [1, 3]
    """Values of k for the top-k accuracy: the fraction of queries with a sample of their class among the k nearest."""
    probes: Annotated[list[Literal[PROBE_NAMES]], Field(description=PROBES_ABOUT)] = []  # pyright: ignore[reportInvalidTypeForm]
    baselines: list[Literal[BASELINES]] = ["teacher"]  # pyright: ignore[reportInvalidTypeForm]
    """What to compare the student with: ``pixels`` (of images) and ``log_mel`` (of audio), which need no model;
    ``encoder``, the frozen encoder that the student shares with its teacher; and ``teacher``."""
    embeddings: Literal["all"] | None = None
    """``all``: also measure pooled features, such as ``output_mean``, the mean of the output's tokens. null: measure
    only the embedding that tables show."""
    datasets: dict[str, LabeledSetConfig | None] = {}
    """Name → data set to measure on. null turns off a data set that the YAML has."""
    max_images: Count | None = None
    """Maximum number of samples from each split, taken at even intervals; null: all samples."""


class RetrievalConfig(LookupConfig):
    """Measurements of embeddings during training, by the callback ZeroShotRetrieval."""

    pooling: Pooling | None = None
    """Pooling of the features that tables show instead of the student's embedding: ``cls``, ``mean`` of all tokens, or
    ``mean_patches``."""
    representation: Representation | None = None
    """Features that are pooled and shown in tables instead of the student's embedding: ``output`` of the last block, or
    ``layer_mean``, the mean of the blocks' normalized FFN outputs."""
    interval: Duration = "5000ba"
    """Time between measurements, in batches or epochs. The last measurement is at the end of the run."""
    at_start: bool = False
    """Also measure the untrained student, before the first batch."""


class RunConfig(Section):
    """Fields of every YAML."""

    seed: Annotated[Whole, FIXED] = 17
    """Seed of random weights, and of the order and the augmentation of samples."""
    precision: SupportedPrecision = "fp32"
    """``fp32``, ``amp_bf16``, ``amp_fp16`` (only on a GPU), or ``auto``. ``auto`` is amp_bf16 on a GPU with bfloat16
    and on a CPU with AVX512-BF16, amp_fp16 on any other GPU, and fp32 on any other CPU."""
    device_eval_batch_size: Count = 256
    """Number of images or clips that each device processes at once in an evaluation."""


class TrainerConfig(RunConfig):
    """Fields of every training run."""

    run_name: Annotated[Text, checked(check_run_name)] = "distill"
    """Name of the run in logs and in the default ``save_folder``."""
    precision: Annotated[SupportedPrecision, NEW_RESULT] = "amp_fp16"
    """``fp32``, ``amp_bf16``, ``amp_fp16`` (only on a GPU), or ``auto``. ``auto`` is amp_bf16 on a GPU with bfloat16
    and on a CPU with AVX512-BF16, amp_fp16 on any other GPU, and fp32 on any other CPU."""
    allow_tf32: bool = True
    """Let a GPU compute float32 matrix products and convolutions in TF32, which is faster and less precise."""
    max_duration: Annotated[Duration, NEW_RESULT] = "30000ba"
    """Length of the run, in batches or epochs."""
    global_train_batch_size: Annotated[Count, FIXED] = 256
    """Number of images or clips in a step of the optimizer, over all devices."""
    device_train_microbatch_size: Microbatch | None = None
    """Number of images or clips in a device's forward pass. null: the device's whole batch. 'auto': Composer
    halves the number until a microbatch fits in the GPU's memory."""
    train_loader: LoaderConfig = LoaderConfig()
    optimizer: Annotated[OptimizerConfig, FIXED] = OptimizerConfig()
    scheduler: Annotated[SchedulerConfig, NEW_RESULT] = SchedulerConfig()
    algorithms: Annotated[AlgorithmsConfig, NEW_RESULT] = AlgorithmsConfig()
    callbacks: Annotated[Arguments, arguments_of(CALLBACKS), Field(description=about("callback", CALLBACKS))] = {}
    loggers: Annotated[Arguments, arguments_of(LOGGERS), Field(description=about("logger", LOGGERS))] = {}
    progress_bar: bool = True
    """Show a progress bar on a terminal, and print a line every ten seconds elsewhere. false: do neither."""
    report: bool = True
    """Write report.html into ``save_folder`` at the end of the run."""
    save_folder: Annotated[PathText, checked(RunFolder.parse)] | None = "runs/{run_name}"
    """Folder of the run's checkpoints, log and record, on this machine or in an object store. The folder must be empty
    or belong to this run. null: save nothing. ``{run_name}`` stands for the name of the run."""
    # In batches only: a resume from an epoch's end would replay that epoch's order and shift all later ones.
    save_interval: Batches = "1000ba"
    """Time between checkpoints, in batches."""
    save_num_checkpoints_to_keep: Annotated[int, Field(ge=-1), must("be at least 1, or -1 for all", bool)] = 3
    """Number of newest checkpoints to keep; -1: keep all checkpoints."""
    autoresume: bool = True
    """Resume from the newest checkpoint in ``save_folder``. false: refuse a ``save_folder`` that has checkpoints."""
    load_path: Annotated[PathText, checked(check_file)] | None = None
    """Checkpoint to resume from if ``save_folder`` has no checkpoint."""
    load_weights_only: bool = False
    """Take only the weights from ``load_path``, and start a new run from them."""

    @property
    def run_folder(self) -> RunFolder | None:
        """The parsed ``save_folder``; ``None`` if the run saves nothing."""
        return None if self.save_folder is None else RunFolder.parse(self.save_folder, self.run_name)

    def contradictions(self) -> Iterator[str]:
        warmup, length = self.scheduler.t_warmup, self.max_duration
        if warmup[-2:] == length[-2:] and int(warmup[:-2]) > int(length[:-2]):
            yield f".{self.long_warmup()}"
        if (size := self.global_train_batch_size) % num_ranks():
            yield f".global_train_batch_size: must be divisible by the number of ranks, {num_ranks()}; got {size}"
        yield from (f".train_loader{fault}" for fault in self.train_loader.faults(size))
        if self.load_weights_only and self.load_path is None:
            yield ".load_weights_only: must be false without a load_path"
        if self.device_train_microbatch_size == "auto" and not has_gpu():
            yield ".device_train_microbatch_size: 'auto' needs a GPU, and this machine has none; set a number or null"

    def long_warmup(self, why: str = "") -> str:
        """Return the error line for a warm-up longer than the run, with ``why`` after the warm-up's length."""
        return (
            f"scheduler.t_warmup: must not be longer than max_duration {self.max_duration}, "
            f"got {self.scheduler.t_warmup}{why}; scheduler.t_warmup=0.1dur is a tenth of any run"
        )


class TrainConfig(TrainerConfig):
    """Fields of ``d2v train``, ``d2v distill`` and recipes/train.py."""

    compile: Annotated[Any, IS_MODE] = False
    """true: use torch.compile and, on a GPU, CUDA graphs where possible. ``default`` or
    ``max-autotune-no-cudagraphs``: use this mode of torch.compile, without CUDA graphs."""
    activation_checkpointing: bool = False
    """Recompute the student's activations in the backward pass instead of keeping the activations in memory."""
    teacher: TeacherSection
    student: Annotated[StudentOptions, FIXED] = StudentOptions()
    objectives: Annotated[ObjectivesConfig, FIXED] = ObjectivesConfig()  # pyright: ignore[reportInvalidTypeForm]
    train_loader: TrainLoaderConfig  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
    alignment: Annotated[AlignmentConfig, NEW_RESULT] = AlignmentConfig()
    retrieval: Annotated[RetrievalConfig, NEW_RESULT] = RetrievalConfig()


class EvaluateConfig(RunConfig, LookupConfig, ModelReference):
    """Fields of ``d2v evaluate``."""

    baselines: list[Literal[BASELINES]] = ["pixels", "log_mel", "teacher"]  # pyright: ignore[reportInvalidTypeForm]
    """What to compare the student with: ``pixels`` (of images) and ``log_mel`` (of audio), which need no model;
    ``encoder``, the frozen encoder that the student shares with its teacher; and ``teacher``, if known."""
    out: Annotated[LocalFolder, AfterValidator(place_to_write)] | None = None
    """Folder for the results: evaluation.json, .csv, .html and, with rivals, .png; null: write no files."""
    rivals: Annotated[tuple[PathText, ...], Field(strict=False)] = ()
    """Further models to show in the same tables: timm/NAME, or the path or address of a student or a teacher. With
    rivals, the speed of each model is measured, too."""

    def contradictions(self) -> Iterator[str]:
        if not any(self.datasets.values()):
            example = "'datasets={cifar10: {format: cifar10, root: datasets, download: true}}'"
            yield f".datasets: must have at least one data set that is not null, such as {example}"
