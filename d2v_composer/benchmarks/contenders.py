"""The programs that the benchmark of a training step compares: a naive one, ours, and ours without one saving."""

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grad_norm_

from d2v_composer.benchmarks.naive import NaiveDistillation
from d2v_composer.benchmarks.sized_models import build_equal_model
from d2v_composer.callbacks import Health
from d2v_composer.models.compilation import compile_model
from d2v_composer.models.data2vec2 import Data2Vec2
from d2v_composer.models.distillation import DistillationModel
from d2v_composer.models.precision import PRECISIONS
from d2v_composer.models.timm_teacher import TimmTeacher

__all__ = [
    "EQUAL",
    "NAIVE",
    "OURS",
    "UNBIASED",
    "WATCHED",
    "Contender",
    "build_contenders",
    "flop_per_image",
]

NAIVE, OURS, UNBIASED, CHECKPOINTED = "naive", "+ torch.compile", "ours, no ALiBi", "ours, checkpointing"
WATCHED = "ours, health each step"
EQUAL = "ours, data2vec 2.0 of equal sizes"
CLIPPING_THRESHOLD = 2.0


class Contender:
    """A model, its optimizer, and their training step.

    Args:
        module: The holder of the weights.
        loss_of: Images → loss.
        precision: fp32, amp_bf16 or amp_fp16.
        flop: Operations of a step, for one image.
        fused: Use the fused AdamW.
    """

    def __init__(
        self, module: nn.Module, loss_of: Callable[[Tensor], Tensor], precision: str, *, flop: int, fused: bool = False
    ) -> None:
        self.module = module
        self.loss_of = loss_of
        self.flop = flop
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=fused
        )
        device = self.trained[0].device.type
        self.scaler = GradScaler(device, enabled=precision == "amp_fp16")
        self.autocast = functools.partial(torch.autocast, device, PRECISIONS[precision], enabled=precision != "fp32")

    def step(self, images: Tensor) -> Tensor:
        """Train one step, and return the loss before it."""
        with self.autocast():
            loss = self.loss_of(images)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        clip_grad_norm_(self.trained, CLIPPING_THRESHOLD)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach()

    @property
    def held_bytes(self) -> int:
        """Size of weights and optimizer state."""
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        tensors = [*self.module.parameters(), *self.module.buffers(), *state]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def build_contenders(model: DistillationModel, precision: str, compiles: bool) -> Iterator[tuple[str, Contender]]:
    """Yield the naive program, our savings added one by one, and variants of ours."""

    def naive(**options: bool) -> Contender:
        module = NaiveDistillation(model, **options)
        return Contender(module, module, precision, flop=flop_per_image(model))

    ours = functools.partial(our_contender, model, precision)
    if isinstance(model.teacher, Data2Vec2):
        yield NAIVE, naive()
        yield "+ one encoder", naive(shares_encoder=True)
    yield "+ fused attention", ours(frozen=False, fused=False)
    if precision != "fp32":
        yield "+ half frozen weights", ours(fused=False)
    yield "+ fused AdamW", ours()
    if compiles:
        yield OURS, ours(compiled=True)
    yield UNBIASED, ours(compiled=compiles, alibi=False)
    yield CHECKPOINTED, ours(compiled=compiles, checkpoints=True)
    yield WATCHED, ours(compiled=compiles, watched=True)
    if isinstance(model.teacher, TimmTeacher) and (equal := build_equal_model(model.teacher)) is not None:
        yield EQUAL, our_contender(equal.to(next(model.parameters()).device), precision, compiled=compiles)


def our_contender(
    model: DistillationModel,
    precision: str,
    *,
    frozen: bool = True,
    fused: bool = True,
    compiled: bool = False,
    alibi: bool = True,
    checkpoints: bool = False,
    watched: bool = False,
) -> Contender:
    """Build a contender of a copy of a model, with some of our savings."""
    module = copy.deepcopy(model)
    module.student.alibi = module.student.alibi if alibi else None
    if frozen:
        module.teacher.cast_weights(PRECISIONS[precision])
    if compiled:
        compile_model(module, packs_weights=next(module.parameters()).device.type == "cpu")
    if checkpoints:
        module.student.checkpoint_activations()
    loss_of = watched_loss(module) if watched else lambda images: module.loss(module(images), images)
    return Contender(module, loss_of, precision, flop=flop_per_image(model), fused=fused)


def flop_per_image(model: DistillationModel) -> int:
    return model.flops_per_batch(torch.empty(1, 0))


def watched_loss(model: DistillationModel) -> Callable[[Tensor], Tensor]:
    """Return the loss function with all measurements of the health callback."""
    health = Health()

    def loss_of(images: Tensor) -> Tensor:
        outputs = model(images)
        with torch.no_grad():
            numbers = health.compare(outputs, model.student.num_extra_tokens, model.student.has_cls_token)
            torch.cat([torch.stack(list(numbers.values())), model.layer_cosines(images, len(images))]).tolist()
        return model.loss(outputs, images)

    return loss_of
