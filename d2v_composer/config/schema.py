"""Every field of a YAML: name, type, limits, default and description; ``d2v fields`` prints them.

The fields of the Trainer, ``optimizer``, ``scheduler``, ``algorithms``, ``callbacks`` and ``loggers`` have the names of
MosaicML's llm-foundry, where it has them. ``train_loader`` is flat: llm-foundry has ``name`` and ``dataset`` in it.
Durations are Composer time strings: '5000ba' batches, '2ep' epochs.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import AfterValidator, BaseModel, ByteSize, Field, ValidationInfo, create_model, model_validator
from typing_extensions import Self

from d2v_composer.config.reference import ImageSizeText, ModelReference, TimmSizes
from d2v_composer.config.resume import FIXED, FIXED_IF_COMPARED, NEW_RESULT, NEW_TARGETS
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
from d2v_composer.models.student import Init
from d2v_composer.objectives import OBJECTIVES
from d2v_composer.sources import FORMAT, FORMATS, LOCAL
from d2v_composer.sources.mds import is_mds
from d2v_composer.system.addresses import RunFolder, check_run_name, place_to_write
from d2v_composer.system.processes import num_nodes, num_ranks

BASELINES = tuple(title for title, row in ROWS.items() if not row.changes_in_training)
PROBE_NAMES = tuple(metric.name for metric in PROBES)
PROBES_ABOUT = "Further metrics of the test images: " + "; ".join(
    f"``{metric.name}`` {metric.about}{'' if 'labels' in metric.needs else ' (needs no labels)'}" for metric in PROBES
)
# Names of the callbacks and loggers that a YAML may choose → their classes, imported when chosen.
CALLBACKS = {
    "health": "d2v_composer.callbacks.health:Health",
    "lr_monitor": "composer.callbacks:LRMonitor",
    "memory_monitor": "composer.callbacks:MemoryMonitor",
    "nan_monitor": "composer.callbacks:NaNMonitor",
    "optimizer_monitor": "composer.callbacks:OptimizerMonitor",
    "runtime_estimator": "composer.callbacks:RuntimeEstimator",
    "speed_monitor": "composer.callbacks:SpeedMonitor",
    "system_metrics_monitor": "composer.callbacks:SystemMetricsMonitor",
}

LOGGERS = {
    "jsonl": "d2v_composer.callbacks.logging:JSONLLogger",
    "mlflow": "d2v_composer.callbacks.logging:RunMLFlowLogger",
    "tensorboard": "composer.loggers:TensorboardLogger",
    "wandb": "composer.loggers:WandBLogger",
}


class OptimizerKind(NamedTuple):
    """An optimizer that a YAML may choose; it takes the fields of :class:`OptimizerConfig`."""

    path: str
    """The class, imported when chosen."""
    arguments: dict[str, Any]
    """Arguments besides the fields."""

    @property
    def log_key(self) -> str:
        """The key below which Composer's LRMonitor logs the learning rate of the first group."""
        return f"lr-{self.path.partition(':')[2]}/group0"


OPTIMIZERS = {
    "adamw": OptimizerKind("torch.optim:AdamW", {"fused": True}),
    "decoupled_adamw": OptimizerKind("composer.optim:DecoupledAdamW", {}),
}
"""Name → optimizer."""

# Context in which a config is validated if its training samples must be there.
NEEDS_DATA = "needs data"


class Section(BaseModel):
    """A section of a YAML: unknown keys, other types and non-finite numbers are errors."""

    model_config = STRICT

    def contradictions(self) -> Iterator[str]:
        """Yield '.key: problem' for each value that is within its own limits but contradicts another value."""
        yield from ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if lines := list(self.contradictions()):
            raise ValueError("\n".join(lines))
        return self


def check_precision(choice: str) -> None:
    """Raise ValueError if this machine cannot compute in a precision."""
    if choice == "amp_fp16" and not has_gpu():
        raise ValueError(
            "amp_fp16 needs a GPU, and this machine has none; on a CPU: precision=fp32 or amp_bf16 or auto"
        )


def has_gpu() -> bool:
    return torch.cuda.is_available()


SupportedPrecision = Annotated[PrecisionChoice, checked(check_precision)]


class TeacherSection(TimmSizes, Section):
    """The frozen teacher."""

    model: Annotated[Text, IS_TEACHER] = DATA2VEC2
    """``data2vec2``; ``timm/NAME`` with a NAME that ``timm.create_model`` accepts; or ``ext/NAME``, a teacher that an
    installed package offers or that you pass in Python."""
    checkpoint: FoundAddress | None
    """Path or address. data2vec2: fairseq's .pt or a converted .safetensors. timm: a .safetensors or PyTorch file;
    null: timm's pretrained weights, from the Hugging Face hub. ext: what the package takes."""
    weights: Weights = "model"
    """Weights to take from a data2vec2 file: ``model``, as trained, or ``ema``, their moving average."""


class StudentOptions(BlockSizes, Section):
    """The student: the arguments of ``Teacher.build_student``."""

    model: Annotated[Text, must("be timm/NAME", lambda name: name.startswith(TIMM_PREFIX))] | None = None
    """null: blocks on the teacher's encoder, as in the thesis chapter. timm/NAME: the whole timm model; its features
    must form a grid, and the other fields, except ``pretrained``, must keep their defaults."""
    pretrained: bool = False
    """With ``model``: start from timm's pretrained weights, fetched from the Hugging Face hub."""

    init: Init = "random"
    """``random``: our choice, because the thesis chapter names none. ``teacher_attention``: copy the attention of the
    teacher's first blocks. ``teacher_blocks``: copy those blocks whole."""
    freeze_copied: bool = False
    """Keep what ``init`` copies as it is, and train the rest. The author of the thesis did so with
    ``teacher_attention``."""


class Objectives(Section):
    """The terms of the loss."""

    def contradictions(self) -> Iterator[str]:
        if not any(term.weight for _, term in self):
            yield ".tokens.weight: must be positive unless another objective's weight is, got 0"


SECTIONS: Any = {name: (objective.Options, objective.Options()) for name, objective in OBJECTIVES.items()}
ObjectivesConfig = create_model("ObjectivesConfig", __base__=Objectives, __doc__=Objectives.__doc__, **SECTIONS)


class LoaderConfig(Section):
    """Workers and augmentation of training images."""

    num_workers: Annotated[int, Field(ge=0, le=1000)] = 8
    """Processes per device that decode samples and put their batches into /dev/shm; if /dev/shm is too small, the run
    fails at the start. 0: the training process decodes the samples."""
    prefetch_factor: PrefetchFactor = 2
    """Batches that each worker prepares ahead."""
    flip: Annotated[Fraction, NEW_RESULT] = 0.5
    """Probability of a horizontal flip."""

    @property
    def store_seconds(self) -> float:
        """How long the samples' store may be unreachable, in seconds; 0 without a store."""
        return 0.0

    def faults(self, batch_size: int) -> Iterator[str]:
        """Yield '.key: problem' for each value that does not suit a global batch size."""
        yield from ()


class ShardLoaderConfig(LoaderConfig):
    """Workers and augmentation of training images, and how they are streamed from MDS shards."""

    crop_scale: Annotated[Range, must("be at most 1", lambda scale: scale[1] <= 1), NEW_RESULT] = (0.08, 1.0)
    """Smallest and largest area of a random crop, as a fraction of the image."""
    crop_ratio: Annotated[Range, NEW_RESULT] = (3 / 4, 4 / 3)
    """Smallest and largest ratio of width to height of a random crop."""
    # The order of clips is by their length in a batch.
    crop_seconds: Annotated[float, Field(ge=0.045, le=3600), FIXED] = 15.6
    """Audio: length of the longest clip. Longer clips are cropped at random; shorter ones are padded to the longest in
    a batch."""
    remote: AddressText | None = None
    """Address of the MDS data set (s3://, gs://, …); null: it is on this machine."""
    timeout: Annotated[float, Field(ge=1, le=1e6)] = 600.0
    """Seconds during which an unreachable store is retried before the run fails."""
    shuffle: Annotated[bool, FIXED] = True
    """Shuffle the samples in every epoch, with Streaming's py1e algorithm."""
    shuffle_block_size: Annotated[Count, FIXED] = 1 << 16
    """Number of samples that are shuffled together; their shards are in use at the same time."""
    num_canonical_nodes: Annotated[Count, FIXED] = 1
    """Streaming's unit of the sample order: the number of nodes, or a multiple of it."""
    cache_limit: Annotated[ByteSize, Field(ge=1), AfterValidator(int)] | None = None
    """Largest size of the cache of a remote data set, in bytes or as '100gb'; null: no limit. If ``shuffle_block_size``
    samples are larger, an epoch fetches shards several times."""

    @property
    def needs_samples_of_a_node(self) -> bool:
        """True if each node must read the same samples in every epoch, because it stores something for each."""
        return self.remote is not None  # its shards

    @property
    def store_seconds(self) -> float:
        return 0.0 if self.remote is None else self.timeout

    def faults(self, batch_size: int) -> Iterator[str]:
        if batch_size % (parts := self.num_canonical_nodes):  # each part gives whole samples to a batch
            yield f".num_canonical_nodes: must divide global_train_batch_size {batch_size}, got {parts}"
        if self.needs_samples_of_a_node and parts % (nodes := num_nodes()):
            yield f".num_canonical_nodes: must be divisible by the {nodes} nodes, got {parts}"


class TrainLoaderConfig(ShardLoaderConfig):
    """The training samples."""

    local: LocalFolder
    """An MDS folder; with ``remote``, the cache."""
    column: Annotated[Text | None, FIXED] = None
    """Column of encoded files (bytes, jpeg, png) or pixels (pil); null: ``image`` or ``audio``. Streaming's own
    converters call it x."""
    views: Annotated[Count | None, FIXED] = None
    """Number of fixed views (crops and flips) of each image: each epoch uses the next one, and after as many epochs the
    first again, in a new order. null: new views in every epoch. From a view's second epoch on, its targets are read
    from a file in ``save_folder`` (2 bytes per value; the run deletes it at its end), and the teacher does not run."""

    @property
    def needs_samples_of_a_node(self) -> bool:
        return super().needs_samples_of_a_node or self.views is not None  # their targets

    def find_missing_data(self) -> str | None:
        """Return '.key: problem' if there are no samples to train on; ``None`` if there are, or a store has them."""
        if self.remote is not None or is_mds(Path(self.local)):
            return None
        return (
            f".remote: must be the address of an MDS data set, such as s3://BUCKET/imagenet/train, because there is "
            f"none in train_loader.local, {self.local}; the YAMLs for ImageNet take it from the variable IMAGENET"
        )

    @model_validator(mode="after")
    def _check_data(self, info: ValidationInfo) -> Self:
        if info.context == NEEDS_DATA and (problem := self.find_missing_data()) is not None:
            raise ValueError(problem)
        return self


class OptimizerConfig(Section):
    """The optimizer."""

    name: Annotated[Text, must(f"be one of {', '.join(OPTIMIZERS)}", OPTIMIZERS.__contains__)] = "adamw"
    """``adamw``: torch.optim.AdamW, fused. ``decoupled_adamw``: Composer's DecoupledAdamW, as in llm-foundry."""
    lr: Positive = 5e-4
    """Learning rate at the end of the warm-up."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.98)
    """Decay rates of the first and the second moment."""
    eps: Positive = 1e-6
    """Number added to the denominator of each update."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay: each step multiplies the weights by 1 - learning rate · weight_decay; with ``decoupled_adamw``, by
    1 - weight_decay · learning rate / ``lr``."""
    decay_norms_and_biases: bool = False
    """Decay 1-D parameters too: norms and biases."""


class SchedulerConfig(Section):
    """The learning rate over the run."""

    name: Literal["cosine_with_warmup"] = "cosine_with_warmup"
    """``cosine_with_warmup``: Composer's CosineAnnealingWithWarmupScheduler."""
    t_warmup: WarmUp = "3000ba"
    """Length of the linear warm-up: batches, epochs, or a fraction of the run ('0.1dur')."""
    alpha_f: Fraction = 0.0
    """Learning rate at the end of the run, as a fraction of ``lr``."""


class GradientClippingConfig(Section):
    """Composer's GradientClipping."""

    clipping_threshold: Positive = 2.0
    """Largest global norm of the gradient."""


class AlgorithmsConfig(Section):
    """Composer's algorithms: {} or arguments turn one on, null turns it off."""

    gradient_clipping: GradientClippingConfig | None = GradientClippingConfig()
    """Clip the gradient by its global norm."""


class LabeledSetConfig(Section):
    """A set to measure embeddings on: labeled train and test images, or test images without labels."""

    format: Annotated[Literal[FORMATS] | None, Field(description=FORMAT)] = None  # pyright: ignore[reportInvalidTypeForm]
    root: AddressText
    """CIFAR: the folder of torchvision's files. speech_commands: what speech_commands_v0.02.tar.gz unpacks to; its
    validation clips are not used. Others: a folder with MDS, or with the same class folders, in ROOT/train and
    ROOT/test; or a SOURCE of ``d2v embed`` with train and test (or validation) in its file or folder names."""
    download: bool = False
    """Download CIFAR if it is missing."""
    column: Annotated[Text | None, FIXED] = None
    """Column of images or audio. null: in MDS ``image`` or ``audio``, else the only one."""
    label_column: Annotated[Text | None, FIXED] = "label"
    """Column of labels (in tars, ``cls`` or ``json:KEY``), unless folders are classes; null: no labels. Without labels
    (null, or a folder without class folders), only the probes ``agreement`` and ``instance`` run, on the test split or,
    if ROOT has no splits, on all of ROOT."""
    class_embeddings: PathText | None = None
    """For the probe ``zero_shot``: a .npy file, (C, P) float, of a text tower's embeddings of the classes, in the order
    of the class names."""

    def contradictions(self) -> Iterator[str]:
        if self.format in LOCAL and "://" in self.root:
            yield f".root: must be a folder on this machine, got {self.root!r}"


class AlignmentConfig(Section):
    """The alignment: the map from the student's raw embeddings to its teacher's embedding, fitted in closed form."""

    max_samples: Annotated[Whole, must(f"be 0, or at least {MIN_PAIRS}", lambda n: n == 0 or n >= MIN_PAIRS)] = 20000
    """Maximum number of training samples to fit the alignment to; 0: none. It is fitted at the end of the run, and
    before each retrieval whose embedding or probes need it."""
    pooling: Annotated[Pooling | None, FIXED] = None
    """Pooling of the teacher's embedding, instead of its default: ``cls``, ``mean`` or ``mean_patches``."""
    representation: Annotated[Representation | None, FIXED] = None
    """Representation of the teacher's embedding, instead of its default: ``output`` of the last block, or
    ``layer_mean``, which the loss regresses."""


class LookupConfig(Section):
    """Retrieval by nearest neighbors, during training or in an evaluation."""

    ks: Annotated[list[Count], Field(min_length=1)] = [1, 3]
    """Report top-k accuracy for each k: the fraction of queries whose k nearest images include one with their label."""
    probes: Annotated[list[Literal[PROBE_NAMES]], Field(description=PROBES_ABOUT)] = []  # pyright: ignore[reportInvalidTypeForm]
    baselines: list[Literal[BASELINES]] = ["teacher"]  # pyright: ignore[reportInvalidTypeForm]
    """Models to compare the student with: ``pixels`` (for audio, ``log_mel``, the mean spectrum), the frozen
    ``encoder`` if the student shares its teacher's, the ``teacher``. A run measures them once."""
    embeddings: Literal["all"] | None = None
    """Embeddings to measure: ``all``, or null: the one that tables show."""
    datasets: dict[str, LabeledSetConfig | None] = {}
    """Name → labeled set; null turns one off."""
    max_images: Count | None = None
    """Maximum number of images from each split, taken at even intervals; null: all."""


class RetrievalConfig(LookupConfig):
    """Retrieval during training, by the callback ZeroShotRetrieval."""

    pooling: Pooling | None = None
    """Pooling of a raw embedding that tables show in place of the embedding: ``cls``, ``mean`` of all tokens, or
    ``mean_patches``."""
    representation: Representation | None = None
    """Representation of a raw embedding that tables show in place of the embedding: ``output`` of the last block, or
    ``layer_mean``, the normalized mean of the FFN outputs."""
    interval: Duration = "5000ba"
    """Time between measurements, in batches or epochs; there is always one at the end of the run."""
    at_start: bool = False
    """Measure the untrained student too."""


class RunConfig(Section):
    """Fields of training and of evaluation."""

    moved: ClassVar[Mapping[str, str]] = {}
    """Former key → the key to write instead."""
    seed: Annotated[Whole, FIXED] = 17
    """Seed of random weights, sample order and augmentation."""
    precision: SupportedPrecision = "fp32"
    """``fp32``, ``amp_bf16``, ``amp_fp16`` (GPU only), or ``auto``: the fastest that this machine supports."""
    device_eval_batch_size: Count = 256
    """Number of images that each device embeds per batch."""


class TrainerConfig(RunConfig):
    """Fields of every run of Composer's Trainer."""

    run_name: Annotated[Text, checked(check_run_name)] = "distill"
    """Name of the run in logs and in the default ``save_folder``."""
    precision: Annotated[SupportedPrecision, NEW_RESULT] = "amp_fp16"
    """``fp32``, ``amp_bf16``, ``amp_fp16`` (GPU only), or ``auto``: the fastest that this machine supports."""
    allow_tf32: Annotated[bool, NEW_TARGETS] = True
    """Let a GPU multiply float32 matrices in TF32, as Composer does. This is faster, with only 10 mantissa bits."""
    max_duration: Annotated[Duration, NEW_RESULT] = "30000ba"
    """Length of the run, in batches or epochs."""
    global_train_batch_size: Annotated[Count, FIXED] = 256
    """Number of images in a step, across all devices."""
    device_train_microbatch_size: Annotated[Microbatch | None, FIXED_IF_COMPARED] = None
    """Number of images in a device's forward pass; null: its whole batch; 'auto': halved until it fits on the GPU."""
    train_loader: LoaderConfig = LoaderConfig()
    optimizer: Annotated[OptimizerConfig, FIXED] = OptimizerConfig()
    scheduler: Annotated[SchedulerConfig, NEW_RESULT] = SchedulerConfig()
    algorithms: Annotated[AlgorithmsConfig, NEW_RESULT] = AlgorithmsConfig()
    callbacks: Annotated[Arguments, arguments_of(CALLBACKS)] = {}
    """Name → arguments, {} for the defaults; null turns one off. Names: health, lr_monitor, memory_monitor,
    nan_monitor, optimizer_monitor, runtime_estimator, speed_monitor, system_metrics_monitor; ``ext/NAME`` for an
    installed package's."""
    loggers: Annotated[Arguments, arguments_of(LOGGERS)] = {}
    """Name → arguments, {} for the defaults; null turns one off. Names: jsonl, mlflow, tensorboard, wandb;
    ``ext/NAME`` for an installed package's."""
    progress_bar: bool = True
    """Show a progress bar on a terminal; elsewhere, print a line every ten seconds. false: neither."""
    report: bool = True
    """Write report.html at the end of the run; ``d2v report`` writes one at any time."""
    save_folder: Annotated[PathText, checked(RunFolder.parse)] | None = "runs/{run_name}"
    """Folder of the run's checkpoints, log and record, on this machine or in an object store. It may hold nothing
    else. null: save nothing. ``{run_name}`` stands for the name."""
    # In batches only: a resume from an epoch's end would replay that epoch's order and shift all later ones.
    save_interval: Batches = "1000ba"
    """Time between checkpoints, in batches."""
    save_num_checkpoints_to_keep: Annotated[int, Field(ge=-1), must("be at least 1, or -1 for all", bool)] = 3
    """Number of newest checkpoints to keep; -1: all."""
    autoresume: bool = True
    """Resume from the newest checkpoint in ``save_folder``. false: refuse a folder that has checkpoints."""
    load_path: Annotated[Annotated[PathText, checked(check_file)] | None, NEW_TARGETS] = None
    """Checkpoint to resume from if ``save_folder`` has none."""
    load_weights_only: bool = False
    """Take only the student's weights from ``load_path``: steps, order of samples and optimizer begin anew, and all
    settings may differ."""

    @property
    def run_folder(self) -> RunFolder | None:
        """The folder ``save_folder``; ``None`` if the run saves nothing."""
        return None if self.save_folder is None else RunFolder.parse(self.save_folder, self.run_name)

    def contradictions(self) -> Iterator[str]:
        warmup, length = self.scheduler.t_warmup, self.max_duration
        if warmup[-2:] == length[-2:] and int(warmup[:-2]) > int(length[:-2]):
            yield f".{self.long_warmup()}"
        if (size := self.global_train_batch_size) % num_ranks():
            yield f".global_train_batch_size: must be divisible by the {num_ranks()} ranks, got {size}"
        yield from (f".train_loader{fault}" for fault in self.train_loader.faults(size))
        if self.load_weights_only and self.load_path is None:
            yield ".load_weights_only: must be false without a load_path"
        if self.device_train_microbatch_size == "auto" and not has_gpu():
            yield ".device_train_microbatch_size: 'auto' needs a GPU, and this machine has none; give a number or null"

    def long_warmup(self, why: str = "") -> str:
        """Return the error line for a warm-up longer than the run: Composer would silently never reach ``lr``."""
        return (
            f"scheduler.t_warmup: must not be longer than max_duration {self.max_duration}, "
            f"got {self.scheduler.t_warmup}{why}; scheduler.t_warmup=0.1dur is a tenth of any run"
        )


class TrainConfig(TrainerConfig):
    """Fields of ``d2v train``, ``d2v distill``, recipes/train.py and recipes/preflight.py."""

    moved = {"prediction": "objectives.tokens.prediction", "targets": "objectives.tokens"}
    compile: Annotated[Any, IS_MODE, NEW_TARGETS] = False
    """true: use torch.compile, on a GPU with one CUDA graph for encoder and target. ``default``: without CUDA graphs.
    ``max-autotune-no-cudagraphs``: also try Triton's matmuls, which takes minutes longer at the start."""
    activation_checkpointing: bool = False
    """Recompute the student's blocks in the backward pass instead of keeping their activations."""
    teacher: TeacherSection
    student: Annotated[StudentOptions, FIXED] = StudentOptions()
    objectives: Annotated[ObjectivesConfig, FIXED] = ObjectivesConfig()  # pyright: ignore[reportInvalidTypeForm]
    train_loader: TrainLoaderConfig  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
    alignment: Annotated[AlignmentConfig, NEW_RESULT] = AlignmentConfig()
    retrieval: Annotated[RetrievalConfig, NEW_RESULT] = RetrievalConfig()
    save_best: bool = False
    """Also keep the checkpoint with the highest ``metrics/mean/top1``, saved when this is measured, as
    ``best-rank0.pt``."""

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        measures_top1 = any(self.retrieval.datasets.values()) and 1 in self.retrieval.ks
        if self.save_best and (self.save_folder is None or not measures_top1):
            yield ".save_best: must be false without a save_folder, retrieval.datasets or 1 in retrieval.ks"
        if self.train_loader.views is not None and self.save_folder is None:
            yield ".train_loader.views: must be null without a save_folder, which holds the views' targets"


class LayerwiseOptimizerConfig(OptimizerConfig):
    """The optimizer, with a learning rate for each depth."""

    layer_decay: Annotated[float, Field(ge=0.01, le=1)] = 1.0
    """Ratio of a block's learning rate to the next block's; the head's learning rate is ``lr``."""


class LabelSmoothingConfig(Section):
    """Composer's LabelSmoothing."""

    smoothing: Fraction = 0.1
    """Smoothing, from 0 (the label alone) to 1 (all classes alike)."""


class MixUpConfig(Section):
    """Composer's MixUp."""

    alpha: Positive = 0.2
    """Parameter of the Beta distribution from which the mixing weight is drawn."""


class CutMixConfig(Section):
    """Composer's CutMix."""

    alpha: Positive = 1.0
    """Parameter of the Beta distribution from which the mixing weight is drawn."""


class ClassifierAlgorithmsConfig(AlgorithmsConfig):
    """Composer's algorithms: {} or arguments turn one on, null turns it off."""

    mixup: MixUpConfig | None = None
    """Composer's MixUp; not with cutmix."""
    cutmix: CutMixConfig | None = None
    """Composer's CutMix; not with mixup."""
    label_smoothing: LabelSmoothingConfig | None = None
    """Composer's LabelSmoothing."""

    def contradictions(self) -> Iterator[str]:
        if self.mixup is not None and self.cutmix is not None:
            yield ".cutmix: must be null with mixup, because Composer cannot mix labels twice"


class LabeledRunConfig(TrainerConfig):
    """Fields of runs that train with labels."""

    eval_interval: Duration = "1ep"
    """Time between evaluations, in batches or epochs; there is always one at the end of the run."""

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.callbacks.get("health") is not None:
            yield ".callbacks.health: must be null in a run with labels, which has no teacher targets"


class FinetuneConfig(LabeledRunConfig, ModelReference):
    """Fields of recipes/finetune.py."""

    train_encoder: Annotated[bool, FIXED] = False
    """Train the encoder too, except data2vec's fixed positions and BEiT's relative position biases."""
    dataset: LabeledSetConfig
    """The MDS data set: the images in ROOT/train are for training, those in ROOT/test for evaluation. With
    ``train_loader.remote``, ROOT/train is the cache."""
    train_loader: ShardLoaderConfig = ShardLoaderConfig()  # pyright: ignore[reportIncompatibleVariableOverride]
    optimizer: Annotated[LayerwiseOptimizerConfig, FIXED] = LayerwiseOptimizerConfig()  # pyright: ignore[reportIncompatibleVariableOverride]
    algorithms: Annotated[ClassifierAlgorithmsConfig, NEW_RESULT] = ClassifierAlgorithmsConfig()  # pyright: ignore[reportIncompatibleVariableOverride]

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.dataset.format not in (None, "mds"):
            advice = "write ROOT/train and ROOT/test by d2v convert-images or convert-audio"
            yield f".dataset.format: must be mds, got {self.dataset.format}; {advice}"
        if self.dataset.label_column is None:
            yield ".dataset.label_column: must name a column: fine-tuning needs labels"


class CocoConfig(Section):
    """Images with boxes."""

    images: LocalFolder
    """Folder of the images."""
    annotations: LocalFolder | None = None
    """COCO's JSON file with the boxes; null: the only .json file in ``images``."""


class CocoSplits(Section):
    """The images with boxes."""

    train: CocoConfig
    test: CocoConfig


class DetectorOptimizerConfig(OptimizerConfig):
    """The optimizer, with a learning rate of its own for the backbone."""

    backbone_lr_ratio: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Ratio of the backbone's learning rate to ``lr``, that of the rest."""


class DetectConfig(LabeledRunConfig):
    """Fields of recipes/detect.py."""

    model: PathText
    """The backbone: an exported student or a training checkpoint (a path, https://, s3://, …), or timm/NAME."""
    pretrained: bool = True
    """For timm/NAME: start from timm's weights, from the Hugging Face hub. false: from random weights."""
    image_size: Annotated[ImageSizeText | None, FIXED] = None
    """Pixels per side, or HEIGHTxWIDTH, to which images are enlarged or shrunk, with a margin that keeps their
    proportions; null: the backbone's."""
    detector: Annotated[Literal["faster_rcnn", "retinanet"], FIXED] = "faster_rcnn"
    """torchvision's ``faster_rcnn`` or ``retinanet``, on a feature pyramid."""
    channels: Annotated[Count, FIXED] = 256
    """Channels of the feature pyramid and of the heads; Faster R-CNN's last layers are four times as wide."""
    frozen_stages: Annotated[Whole, FIXED] = 0
    """Number of first parts of the backbone that are not trained: 1, the stem (in a student of blocks, the encoder,
    which is always frozen); 2, also the first stage or block; and so on."""
    dataset: CocoSplits
    optimizer: Annotated[DetectorOptimizerConfig, FIXED] = DetectorOptimizerConfig()  # pyright: ignore[reportIncompatibleVariableOverride]


class EvaluateConfig(RunConfig, LookupConfig, ModelReference):
    """Fields of ``d2v evaluate``."""

    baselines: list[Literal[BASELINES]] = ["pixels", "log_mel", "teacher"]  # pyright: ignore[reportInvalidTypeForm]
    """Models to compare the student with: ``pixels`` or, for audio, ``log_mel``; the frozen ``encoder`` if the student
    shares its teacher's; the ``teacher``, if it is known."""
    out: Annotated[LocalFolder, AfterValidator(place_to_write)] | None = None
    """Folder for evaluation.json and evaluation.csv."""
    rivals: Annotated[tuple[PathText, ...], Field(strict=False)] = ()
    """Further models in the same tables: timm/NAME, with timm's weights and preprocessing, or paths or addresses of
    students and teachers. With rivals, speeds are measured, too."""

    def contradictions(self) -> Iterator[str]:
        if not any(self.datasets.values()):
            example = "'datasets={cifar10: {format: cifar10, root: datasets, download: true}}'"
            yield f".datasets: must have at least one data set that is not null, such as {example}"
