"""Every field of a YAML: name, type, default and limits.

The names are those of MosaicML's own recipes. Durations are Composer time strings: '5000ba' batches, '2ep' epochs.
"""

import math
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from d2v_composer.config.field_checks import (
    check_cache_limit,
    check_image_size,
    check_load_path,
    check_probes,
    check_references,
)
from d2v_composer.config.limits import SMALLEST_FLOAT, duration, limited, must
from d2v_composer.models.names import DATA2VEC2, Pooling, PrecisionChoice, Representation
from d2v_composer.models.timm_config import PREFIX, parse_image_size
from d2v_composer.system.addresses import Address, RunFolder, check_run_name

__all__ = [
    "AlgorithmsConfig",
    "LabelledSetConfig",
    "LoaderConfig",
    "LookupConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "ShardLoaderConfig",
    "TeacherConfig",
    "TrainConfig",
    "TrainLoaderConfig",
    "TrainerConfig",
    "is_here",
]

SECONDS_OF_A_WEEK = 7 * 24 * 3600

is_teacher = must(f"be {DATA2VEC2} or timm/NAME", lambda name: name == DATA2VEC2 or name.startswith(PREFIX))
is_here = must("be a folder of this machine", lambda folder: "://" not in folder)
is_pair = must("be two numbers, 0 < smallest <= largest", lambda pair: len(pair) == 2 and 0 < pair[0] <= pair[1])
are_betas = must("be two numbers from 0 to below 1", lambda pair: len(pair) == 2 and min(pair) >= 0 and max(pair) < 1)
are_ks = must("be one or more numbers from 1", lambda ks: ks and min(ks) >= 1)
is_kept = must("be at least 1, or -1 for all", lambda number: number == -1 or number >= 1)
is_microbatch = must(
    "be at least 1, 'auto' or null", lambda size: size >= 1 if isinstance(size, int) else size == "auto"
)


@dataclass
class TimmSizes:
    """Sizes of a model timm/NAME."""

    first_blocks: int | None = limited(None, least=0)
    """Blocks in the shared encoder; default: a sixth of all, for data2vec2 those of its modality encoder."""
    image_size: int | str | None = limited(None, check=check_image_size)
    """Pixels a side, or HEIGHTxWIDTH; default: timm's for this model."""

    def __post_init__(self) -> None:
        """Write each size in one way only: a resume compares them. A wrong one is found with the other wrong values."""
        with suppress(ValueError):
            size = None if self.image_size is None else parse_image_size(self.image_size)
            self.image_size = size if isinstance(size, int | None) else "x".join(map(str, size))


@dataclass
class TeacherConfig(TimmSizes):
    model: str = limited(DATA2VEC2, check=is_teacher)
    """data2vec2, or timm/NAME, NAME as timm.create_model takes it."""
    checkpoint: str | None = limited(MISSING, check=Address.parse)
    """A path, https://, s3://, gs://, …: of data2vec2 fairseq's .pt or a converted .safetensors, of timm a .safetensors
    or PyTorch file; null: timm's pretrained weights, from the Hugging Face hub."""
    weights: Literal["model", "ema"] = "model"
    """Of data2vec2."""


@dataclass
class StudentOptions:
    depth: int = limited(5, least=1, most=1000)
    mlp_ratio: float = limited(3.0, least=SMALLEST_FLOAT, most=1000)
    alibi: bool = True
    init: Literal["random", "teacher_attention", "teacher_blocks"] = "random"
    num_heads: int | None = limited(None, least=1)
    """Default: the teacher's."""
    num_alibi_heads: int | None = limited(None, least=1)
    """Default: all heads."""


@dataclass
class TargetsConfig:
    extra_tokens: Literal["regress", "drop", "only"] = "regress"
    """Regress CLS and registers like patches; drop them, as data2vec's own pre-training; or regress no patch."""
    average_top_k_layers: int | None = limited(None, least=1)
    """Default: the teacher's."""
    source: Literal["ffn", "block"] = "ffn"
    """The teacher's FFN outputs, or its blocks' outputs: the residual stream of a pre-norm ViT."""
    normalisation: Literal["instance", "layer"] = "instance"
    """Of each layer, of target and prediction: over time, as the paper, or over channels."""


@dataclass
class LoaderConfig:
    """Workers and augmentation of a training's images."""

    num_workers: int = limited(8, least=0, most=1000)
    prefetch_factor: int = limited(2, least=1, most=1000)
    crop_scale: list[float] = limited([0.08, 1.0], most=1, check=is_pair)
    crop_ratio: list[float] = limited([3 / 4, 4 / 3], check=is_pair)
    flip: float = limited(0.5, least=0, most=1)


@dataclass
class ShardLoaderConfig(LoaderConfig):
    """How images are streamed from MDS shards."""

    remote: str | None = limited(None, check=Address.parse)
    """s3://, gs://, …; default: the data set is on this machine."""
    timeout: float = limited(600.0, least=1, most=SECONDS_OF_A_WEEK)
    """Seconds for which an unreachable store is retried before the run ends."""
    shuffle: bool = True
    shuffle_block_size: int = limited(1 << 16, least=1)
    """Samples that are shuffled together; their shards are in use at the same time."""
    num_canonical_nodes: int = limited(1, least=1)
    cache_limit: int | str | None = limited(None, most=math.inf, check=check_cache_limit)
    """Size of the cache of a remote data set, in bytes or as '100gb'; default: unlimited."""


@dataclass
class TrainLoaderConfig(ShardLoaderConfig):
    local: str = limited(MISSING, check=is_here)
    """An MDS folder, or the cache of ``remote``."""
    column: str = "image"
    """The column of images; Streaming's own converters call it x."""


@dataclass
class OptimizerConfig:
    """torch.optim.AdamW."""

    lr: float = limited(5e-4, least=SMALLEST_FLOAT)
    betas: list[float] = limited([0.9, 0.98], check=are_betas)
    eps: float = limited(1e-6, least=SMALLEST_FLOAT)
    weight_decay: float = limited(0.01, least=0)
    decay_norms_and_biases: bool = False
    """Decay 1-D parameters too, norms and biases."""


@dataclass
class SchedulerConfig:
    """Composer's CosineAnnealingWithWarmupScheduler."""

    t_warmup: str = limited("3000ba", check=duration("ba", "ep", "dur", least=0))
    alpha_f: float = limited(0.0, least=0, most=1)


@dataclass
class GradientClippingConfig:
    clipping_threshold: float = limited(2.0, least=SMALLEST_FLOAT)
    """Largest global norm of the gradient."""


@dataclass
class AlgorithmsConfig:
    gradient_clipping: GradientClippingConfig | None = field(default_factory=GradientClippingConfig)


@dataclass
class FSDPConfig:
    """torch's fully_shard (FSDP2), through Composer."""

    reshard_after_forward: bool = True
    """Free a block's weights after its forward pass and gather them again for its backward pass."""
    mixed_precision: Literal["DEFAULT", "PURE", "FULL"] = "DEFAULT"
    """Composer's: the precision of gathered weights and reduced gradients."""


@dataclass
class ParallelismConfig:
    fsdp: FSDPConfig | None = None
    """Default: every device holds all weights (DDP)."""


@dataclass
class LabelledSetConfig:
    format: Literal["cifar10", "cifar100", "folder", "mds"] = MISSING
    root: str = limited(MISSING, check=is_here)
    download: bool = False
    column: str = "image"
    """The column of images in an MDS data set."""
    label_column: str = "label"
    """The column of labels in an MDS data set."""


@dataclass
class LookupConfig:
    """Retrieval by nearest neighbours, during training or in an evaluation."""

    ks: list[int] = limited([1, 3], check=are_ks)
    probes: list[str] = limited([], check=check_probes)
    """Of knn, linear: classify the test images, too."""
    datasets: dict[str, LabelledSetConfig | None] = field(default_factory=dict)
    """Name → location; null: off."""
    max_images: int | None = limited(None, least=1)
    """Use at most this many images of each split, evenly spaced; default: all."""


@dataclass
class RetrievalConfig(LookupConfig):
    pooling: Pooling = "cls"
    representation: Representation = "output"
    interval: str = limited("5000ba", check=duration("ba", "ep", "dur"))
    at_start: bool = False
    references: list[str] = limited(["teacher"], check=check_references)


@dataclass
class RunConfig:
    """Fields of training and of evaluation."""

    seed: int = limited(17, least=0)
    precision: PrecisionChoice = "fp32"
    device_eval_batch_size: int = limited(256, least=1)


@dataclass
class TrainerConfig(RunConfig):
    """Fields of every run of Composer's Trainer."""

    run_name: str = limited("distill", check=check_run_name)
    precision: PrecisionChoice = "amp_fp16"
    allow_tf32: bool = True
    """Allow a GPU to multiply float32 matrices in TF32, as Composer does: faster, with a mantissa of 10 bits."""
    max_duration: str = limited("30000ba", check=duration("ba", "ep"))
    global_train_batch_size: int = limited(256, least=1)
    device_train_microbatch_size: int | str | None = limited(None, check=is_microbatch)
    """Default: the whole batch of a device; 'auto' on a GPU."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Name of Composer's callback → its arguments; null: off."""
    loggers: dict[str, Any] = field(default_factory=dict)
    """Name of the logger → its arguments; null: off."""
    progress_bar: bool = True
    log_to_console: bool = False
    console_log_interval: str = limited("100ba", check=duration("ba", "ep"))
    report: bool = True
    """Write report.html at the end of the run; recipes/report.py writes one at any time."""
    save_folder: str | None = limited("runs/${run_name}", check=RunFolder.parse)
    """Checkpoints, log and record of the run: a path or an object store's address. null: save nothing."""
    # In batches only: a resume from an epoch's end would replay that epoch's order and shift all later ones.
    save_interval: str = limited("1000ba", check=duration("ba"))
    save_num_checkpoints_to_keep: int = limited(3, check=is_kept)
    autoresume: bool = True
    load_path: str | None = limited(None, check=check_load_path)


@dataclass
class TrainConfig(TrainerConfig):
    """Fields of recipes/train.py."""

    compile: bool = False
    frozen_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Storage of the frozen linear and convolution weights; default: the compute dtype of ``precision``."""
    activation_checkpointing: bool = False
    """Recompute the student's blocks in the backward pass instead of keeping their activations."""
    parallelism_config: ParallelismConfig = field(default_factory=ParallelismConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentOptions = field(default_factory=StudentOptions)
    prediction: Literal["layer_mean", "last_block"] = "layer_mean"
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    train_loader: TrainLoaderConfig = field(default_factory=TrainLoaderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    algorithms: AlgorithmsConfig = field(default_factory=AlgorithmsConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)


@dataclass
class ModelConfig(TimmSizes):
    """A model that somebody has trained, and which of its embeddings to use."""

    model: str = MISSING
    """A data2vec 2.0 teacher's file, a training checkpoint or an exported student: a path, https://, s3://, …; or
    timm/NAME."""
    checkpoint: str | None = limited(None, check=Address.parse)
    """Of a model timm/NAME: a .safetensors or PyTorch file; default: timm's pretrained weights, from the Hugging Face
    hub."""
    weights: Literal["model", "ema"] = "model"
    """Weights of a teacher's file."""
    teacher: str | None = None
    """The student's teacher; default: a checkpoint's own, if it is still there; none for an exported student."""
    pooling: Pooling | None = None
    """Default: as in the model's run; without one, cls."""
    representation: Representation | None = None
    """Default: as in the model's run; without one, output."""
