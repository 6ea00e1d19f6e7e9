"""Every field of a YAML: name, type, default and limits.

The names are those of MosaicML's own recipes. Durations are Composer time strings: '5000ba' batches, '2ep' epochs.
"""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from omegaconf import MISSING

from d2v_composer.evaluation.metrics import PROBES
from d2v_composer.models.encoder import MAX_WIDTH, parse_image_size
from d2v_composer.models.names import DATA2VEC2, PREFIX, Pooling, PrecisionChoice, Representation
from d2v_composer.system.addresses import Address, RunFolder, check_path, check_run_name

# MERGED FROM d2v_composer/config/schema.py: Limits of a config's fields, and the one checker that walks the

# Also the largest seed: ranks and epochs add to it, and numpy's seeds end at 2^32.
LARGEST_INT = (1 << 31) - 1
# float32 ends at 1e-38 and 3e38.
SMALLEST_FLOAT, LARGEST_FLOAT = 1e-30, 1e30

Check = Callable[[Any], object]


def limited(default: Any, least: float | None = None, most: float | None = None, check: Check | None = None) -> Any:
    """Return a dataclass field with a default and limits.

    Args:
        default: Copied for each config.
        least: Of the number, or of each number in a list.
        most: Likewise.
        check: Raises ValueError if the value is not allowed.
    """
    return field(default_factory=lambda: copy(default), metadata={"least": least, "most": most, "check": check})


def find_wrong_values(section: Any, prefix: str = "") -> Iterator[str]:
    """Yield a line for each field, nested sections included, whose value is outside its limits."""
    for each in fields(section):
        key, value = prefix + each.name, getattr(section, each.name)
        try:
            if value is not None:
                _test(value, **each.metadata)
        except ValueError as error:
            yield f"{key}: {error}"
        inner = {f"{key}.{name}": it for name, it in value.items()} if isinstance(value, Mapping) else {key: value}
        for name, it in inner.items():
            if is_dataclass(it):
                yield from find_wrong_values(it, f"{name}.")


def _test(value: Any, least: float | None = None, most: float | None = None, check: Check | None = None) -> None:
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int | float) and not isinstance(number, bool):
            largest = LARGEST_INT if isinstance(number, int) else LARGEST_FLOAT
            smallest, largest = -largest if least is None else least, largest if most is None else most
            if not math.isfinite(number):
                raise ValueError(f"must be finite, got {value}")
            if number < smallest:
                raise ValueError(f"must be at least {smallest}, got {value}")
            if number > largest:
                raise ValueError(f"must be at most {largest}, got {value}")
    if check is not None:
        check(value)


def must(rule: str, holds: Callable[[Any], bool]) -> Check:
    """Return a check of one rule: 'be …' or 'have …'."""

    def check(value: Any) -> None:
        if not holds(value):
            raise ValueError(f"must {rule}, got {value!r}")

    return check


def duration(*units: str, least: int = 1) -> Check:
    """Return a check of Composer time strings: 'ba' batches, 'ep' epochs, 'dur' a share of the run."""
    example = " or ".join("'0.1dur'" if unit == "dur" else f"'5{unit}'" for unit in units)

    def check(text: str) -> None:
        from composer.core import Time, TimeUnit  # takes seconds, and only a training has durations

        try:
            time = Time.from_timestring(text)
        except (TypeError, ValueError):
            time = None
        if time is None or time.unit.value not in units:
            raise ValueError(f"must be a duration such as {example}, got {text!r}")
        if time.unit == TimeUnit.DURATION:
            if not 0 <= time.value <= 1:
                raise ValueError(f"must be from 0dur to 1dur, got {text!r}")
        elif time.value < least:
            raise ValueError(f"must be positive, got {text!r}")

    return check


def suggest(name: str, allowed: Sequence[str]) -> str:
    """Return the hint that follows an unknown name: the nearest one, and all that are allowed."""
    nearest = difflib.get_close_matches(name, allowed, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"{hint} (allowed: {', '.join(allowed)})" if allowed else hint


# MERGED FROM d2v_composer/config/schema.py: Checks of single fields that need more than a comparison; each raises

BASELINES = ("pixels", "encoder", "teacher")


def check_cache_limit(limit: int | str) -> None:
    from streaming.base.util import bytes_to_int  # takes seconds

    try:
        bytes_to_int(limit)
    except ValueError:
        raise ValueError(f"must be bytes or a size such as '100gb', got {limit!r}") from None


def check_load_path(text: str) -> None:
    """Refuse an address or path that Composer would look up elsewhere."""
    if not Address.parse(text).is_remote:
        check_path(text)


def check_image_size(size: int | str) -> None:
    try:
        parse_image_size(size)
    except ValueError:
        raise ValueError(
            f"must be a number of pixels or HEIGHTxWIDTH, each from 1 to {MAX_WIDTH}, got {size!r}"
        ) from None


def check_probes(names: list[str]) -> None:
    for name in names:
        if name not in PROBES:
            raise ValueError(f"no such probe {name!r}{suggest(name, list(PROBES))}")


def check_baselines(names: list[str]) -> None:
    for name in names:
        if name not in BASELINES:
            raise ValueError(f"no such baseline {name!r}{suggest(name, BASELINES)}")


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
    normalization: Literal["instance", "layer"] = "instance"
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
class LabeledSetConfig:
    format: Literal["cifar10", "cifar100", "folder", "mds"] = MISSING
    root: str = limited(MISSING, check=is_here)
    download: bool = False
    column: str = "image"
    """The column of images in an MDS data set."""
    label_column: str = "label"
    """The column of labels in an MDS data set."""


@dataclass
class LookupConfig:
    """Retrieval by nearest neighbors, during training or in an evaluation."""

    ks: list[int] = limited([1, 3], check=are_ks)
    probes: list[str] = limited([], check=check_probes)
    """Of knn, linear: classify the test images, too."""
    datasets: dict[str, LabeledSetConfig | None] = field(default_factory=dict)
    """Name → location; null: off."""
    max_images: int | None = limited(None, least=1)
    """Use at most this many images of each split, evenly spaced; default: all."""


@dataclass
class RetrievalConfig(LookupConfig):
    pooling: Pooling = "cls"
    representation: Representation = "output"
    interval: str = limited("5000ba", check=duration("ba", "ep", "dur"))
    at_start: bool = False
    baselines: list[str] = limited(["teacher"], check=check_baselines)


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
    """Write report.html at the end of the run; d2v report writes one at any time."""
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


# MERGED FROM d2v_composer/config/schema.py: Every field of a YAML for recipes/finetune.py, beside those of any


@dataclass
class FinetuneLoaderConfig(ShardLoaderConfig):
    stream: bool = False
    """Read the train images of an MDS data set from its shards in each epoch, instead of once into memory. With
    ``remote``, ROOT/train is the cache."""


@dataclass
class LayerwiseOptimizerConfig(OptimizerConfig):
    layer_decay: float = limited(1.0, least=0.01, most=1)
    """The learning rate of a block over that of the block after it; the head's is ``lr``."""


@dataclass
class LabelSmoothingConfig:
    smoothing: float = limited(0.1, least=0, most=1)


@dataclass
class MixUpConfig:
    alpha: float = limited(0.2, least=0, most=1000)


@dataclass
class CutMixConfig:
    alpha: float = limited(1.0, least=0, most=1000)


@dataclass
class EMAConfig:
    half_life: str = limited("1000ba", check=duration("ba"))


@dataclass
class ClassifierAlgorithmsConfig(AlgorithmsConfig):
    """Composer's algorithms; null: off."""

    label_smoothing: LabelSmoothingConfig | None = None
    mixup: MixUpConfig | None = None
    cutmix: CutMixConfig | None = None
    ema: EMAConfig | None = None
    """Evaluate and save a moving average of the weights."""


@dataclass
class FinetuneConfig(TrainerConfig, ModelConfig):
    """Fields of recipes/finetune.py."""

    train_encoder: bool = False
    from_scratch: bool = False
    """Forget the weights: the same network, with random ones."""
    dataset: LabeledSetConfig | None = None
    """Required. Its train images train, its test images are the evaluation's."""
    train_loader: FinetuneLoaderConfig = field(default_factory=FinetuneLoaderConfig)
    eval_interval: str = limited("1ep", check=duration("ba", "ep"))
    optimizer: LayerwiseOptimizerConfig = field(default_factory=LayerwiseOptimizerConfig)
    algorithms: ClassifierAlgorithmsConfig = field(default_factory=ClassifierAlgorithmsConfig)


# MERGED FROM d2v_composer/config/schema.py: Every field of a YAML for d2v evaluate.


@dataclass
class EvaluateConfig(RunConfig, LookupConfig, ModelConfig):
    """Fields of d2v evaluate."""

    out: str | None = limited(None, check=is_here)
    """Folder for evaluation.json and evaluation.csv."""
