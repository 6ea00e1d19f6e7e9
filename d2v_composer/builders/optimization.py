"""Build optimizer, schedule, gradient clipping and sharding."""

from dataclasses import asdict
from typing import Any

import torch
from composer.algorithms import CutMix, GradientClipping, LabelSmoothing, MixUp
from composer.core import Algorithm, Time, TimeUnit
from composer.optim import ComposerScheduler, CosineAnnealingScheduler, CosineAnnealingWithWarmupScheduler
from composer.utils import FSDP2Config, ParallelismConfig

from d2v_composer.callbacks.ema import EMA
from d2v_composer.callbacks.gradient_norm import GradientNorm
from d2v_composer.config.finetune import ClassifierAlgorithmsConfig, LayerwiseOptimizerConfig
from d2v_composer.config.schema import AlgorithmsConfig, OptimizerConfig, TrainConfig, TrainerConfig
from d2v_composer.config.values import describe_long_warmup
from d2v_composer.models.classification import Classifier
from d2v_composer.system.errors import InputError

__all__ = [
    "build_algorithms",
    "build_classifier_algorithms",
    "build_layerwise_optimizer",
    "build_optimizer",
    "build_parallelism",
    "build_scheduler",
]


def build_optimizer(config: OptimizerConfig, model: torch.nn.Module) -> torch.optim.AdamW:
    """Build torch's AdamW of the trained parameters; norms and biases have a group of their own."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, vectors = [each for each in trained if each.ndim > 1], [each for each in trained if each.ndim <= 1]
    return _adamw(config, [{"params": matrices}, {"params": vectors}])


def build_layerwise_optimizer(config: LayerwiseOptimizerConfig, model: Classifier) -> torch.optim.AdamW:
    """Build torch's AdamW with a learning rate for each depth; the head's group, with ``lr``, comes first."""
    head, weights = max(model.depth_of_trained.values()), dict(model.named_parameters())
    groups: dict[tuple[int, bool], list[torch.nn.Parameter]] = {}
    for name, depth in model.depth_of_trained.items():
        groups.setdefault((head - depth, weights[name].ndim <= 1), []).append(weights[name])
    ordered = sorted(groups)
    return _adamw(
        config, [{"params": groups[each], "lr": config.lr * config.layer_decay ** each[0]} for each in ordered]
    )


def _adamw(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """Build torch's AdamW of groups that each have matrices or norms and biases alone."""
    for group in groups:
        decays = config.decay_norms_and_biases or any(each.ndim > 1 for each in group["params"])
        group["weight_decay"] = config.weight_decay if decays else 0.0
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def build_scheduler(config: TrainerConfig, batches_per_epoch: int) -> ComposerScheduler:
    """Build a linear warm-up, then a cosine that ends at ``alpha_f`` of the learning rate.

    Raises:
        InputError: The warm-up is longer than the run. If only one of them is in epochs, this depends on the data.
    """
    warmup, duration = map(Time.from_timestring, (config.scheduler.t_warmup, config.max_duration))
    batches = {TimeUnit.BATCH: 1, TimeUnit.EPOCH: batches_per_epoch}
    num_batches = batches[TimeUnit.DURATION] = duration.value * batches[duration.unit]
    num_warmup = int(warmup.value * batches[warmup.unit])
    if num_warmup > num_batches:
        raise InputError(describe_long_warmup(config, f" with {batches_per_epoch} batches an epoch"))
    alpha_f = config.scheduler.alpha_f
    if num_warmup == 0:  # Composer would warn
        return CosineAnnealingScheduler(alpha_f=alpha_f)
    return CosineAnnealingWithWarmupScheduler(t_warmup=Time(num_warmup, TimeUnit.BATCH), alpha_f=alpha_f)


def build_algorithms(config: AlgorithmsConfig) -> list[Algorithm]:
    """Build the section ``algorithms``, and the logger of the gradient's norm."""
    clipping = config.gradient_clipping
    if clipping is None:
        return [GradientNorm()]
    return [GradientClipping(clipping_type="norm", clipping_threshold=clipping.clipping_threshold), GradientNorm()]


def build_classifier_algorithms(config: ClassifierAlgorithmsConfig) -> list[Algorithm]:
    """Build the section ``algorithms`` of a fine-tuning; labels are mixed before they are smoothed."""
    algorithms = build_algorithms(config)
    if config.mixup is not None:
        algorithms.append(MixUp(**asdict(config.mixup)))
    if config.cutmix is not None:
        algorithms.append(CutMix(**asdict(config.cutmix)))
    if config.label_smoothing is not None:
        algorithms.append(LabelSmoothing(**asdict(config.label_smoothing)))
    if config.ema is not None:
        algorithms.append(EMA(**asdict(config.ema)))
    return algorithms


def build_parallelism(config: TrainConfig) -> ParallelismConfig | None:
    """Build the section ``parallelism_config``; a checkpoint is one file all the same."""
    fsdp = config.parallelism_config.fsdp
    return None if fsdp is None else ParallelismConfig(fsdp2=FSDP2Config(state_dict_type="full", **asdict(fsdp)))
