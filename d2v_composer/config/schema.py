"""Every field of a training YAML: name, type, default and check. Nothing else reads OmegaConf.

The names are those of MosaicML's own recipes. Durations are Composer time strings: '5000ba' batches, '2ep' epochs.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

__all__ = ["EvaluateConfig", "TrainConfig"]


@dataclass
class TeacherConfig:
    checkpoint: str = MISSING
    """fairseq's .pt or a converted .safetensors: a path, https://, s3://, gs://, …"""
    weights: Literal["model", "ema"] = "model"


@dataclass
class StudentConfig:
    depth: int = 5
    mlp_ratio: float = 3.0
    alibi: bool = True
    init: Literal["random", "teacher_attention", "teacher_blocks"] = "random"
    num_heads: int | None = None
    """Default the teacher's."""
    num_alibi_heads: int | None = None
    """Default all heads."""


@dataclass
class TargetsConfig:
    extra_tokens: Literal["regress", "drop"] = "regress"
    average_top_k_layers: int | None = None
    """Default the teacher's own number."""


@dataclass
class TrainLoaderConfig:
    local: str = MISSING
    """An MDS folder, or where the shards of ``remote`` are kept."""
    remote: str | None = None
    """s3://, gs://, …; default: ``local`` is the data set."""
    column: str = "image"
    """The one with the images; Streaming's own converters call it x."""
    num_workers: int = 8
    prefetch_factor: int = 2
    timeout: float = 600.0
    """How many seconds an unreachable store is tried again before the run ends."""
    shuffle: bool = True
    shuffle_block_size: int = 1 << 16
    """How many samples are mixed with each other: the shards of as many are in use at a time."""
    num_canonical_nodes: int = 1
    cache_limit: int | str | None = None
    """What ``local`` may hold of a remote data set, in bytes or as '100gb'; default: all of it."""
    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    crop_ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    flip: float = 0.5


@dataclass
class OptimizerConfig:
    """torch.optim.AdamW; no weight decay on 1-D parameters."""

    lr: float = 5e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-6
    weight_decay: float = 0.01


@dataclass
class SchedulerConfig:
    """Composer's CosineAnnealingWithWarmupScheduler."""

    t_warmup: str = "3000ba"
    alpha_f: float = 0.0


@dataclass
class GradientClippingConfig:
    clipping_threshold: float = 2.0
    """Of the gradient's global norm."""


@dataclass
class AlgorithmsConfig:
    gradient_clipping: GradientClippingConfig | None = field(default_factory=GradientClippingConfig)


@dataclass
class FSDPConfig:
    """torch's fully_shard (FSDP2), through Composer."""

    reshard_after_forward: bool = True
    """Whether a block's weights are let go of after its forward and gathered again for its backward."""
    mixed_precision: Literal["DEFAULT", "PURE", "FULL"] = "DEFAULT"
    """Composer's: what weights are gathered and gradients reduced in."""


@dataclass
class ParallelismConfig:
    fsdp: FSDPConfig | None = None
    """Default: every device holds all weights (DDP)."""


@dataclass
class LabelledSetConfig:
    format: Literal["cifar10", "cifar100", "folder", "mds"] = MISSING
    root: str = MISSING
    download: bool = False
    column: str = "image"
    """Of mds: the one with the images."""
    label_column: str = "label"
    """Of mds: the one with the labels."""


@dataclass
class RetrievalConfig:
    interval: str = "5000ba"
    at_start: bool = False
    ks: list[int] = field(default_factory=lambda: [1, 3])
    pooling: Literal["cls", "mean", "mean_patches"] = "cls"
    representation: Literal["output", "layer_mean"] = "output"
    references: list[str] = field(default_factory=lambda: ["teacher"])
    """Of: pixels, encoder, teacher."""
    max_images: int | None = None
    """Use at most so many images of each split, evenly spaced; default all."""
    datasets: dict[str, LabelledSetConfig | None] = field(default_factory=dict)
    """Name → where it is; null: off."""


@dataclass
class TrainConfig:
    run_name: str = "distill"
    seed: int = 17
    precision: Literal["fp32", "amp_fp16", "amp_bf16"] = "amp_fp16"
    allow_tf32: bool = True
    """Whether a GPU may compute float32 products in TF32, as Composer has it; faster, with 10 bits of mantissa."""
    max_duration: str = "30000ba"
    global_train_batch_size: int = 256
    device_train_microbatch_size: int | str | None = None
    """Default the whole batch of a device; 'auto' on a GPU."""
    device_eval_batch_size: int = 256
    compile: bool = False
    frozen_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """What the frozen linear and convolution weights are kept in; default: what ``precision`` computes in."""
    activation_checkpointing: bool = False
    """Whether the student's blocks are computed once more in the backward pass instead of kept."""
    parallelism_config: ParallelismConfig = field(default_factory=ParallelismConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    prediction: Literal["layer_mean", "last_block"] = "layer_mean"
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    train_loader: TrainLoaderConfig = field(default_factory=TrainLoaderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    algorithms: AlgorithmsConfig = field(default_factory=AlgorithmsConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Name of Composer's callback → its arguments; null: off."""
    loggers: dict[str, Any] = field(default_factory=dict)
    """Name of the logger → its arguments; null: off."""
    progress_bar: bool = True
    log_to_console: bool = False
    console_log_interval: str = "100ba"
    report: bool = True
    """Whether the run ends with its report.html; recipes/report.py makes one at any time."""
    save_folder: str | None = "runs/${run_name}"
    """Checkpoints, log and record of the run; a path or an object store's address. null: nothing is saved."""
    save_interval: str = "1000ba"
    save_num_checkpoints_to_keep: int = 3
    autoresume: bool = True
    load_path: str | None = None


@dataclass
class EvaluateConfig:
    """What recipes/evaluate.py measures, and how."""

    model: str = MISSING
    """A teacher's file, a training checkpoint, or an exported student: a path, https://, s3://, …"""
    weights: Literal["model", "ema"] = "model"
    """Of a teacher's file."""
    teacher: str | None = None
    """The student's teacher; default, for a checkpoint, where it was; an exported student has none without."""
    seed: int = 17
    """Of the untrained student."""
    precision: Literal["fp32", "amp_fp16", "amp_bf16"] = "fp32"
    device_eval_batch_size: int = 256
    ks: list[int] = field(default_factory=lambda: [1, 3])
    pooling: Literal["cls", "mean", "mean_patches"] = "cls"
    representation: Literal["output", "layer_mean"] = "output"
    datasets: dict[str, LabelledSetConfig | None] = field(default_factory=dict)
    """Name → where it is; null: off."""
    out: str | None = None
    """A folder for evaluation.json and evaluation.csv."""
