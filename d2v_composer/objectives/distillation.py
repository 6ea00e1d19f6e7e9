"""The model that Composer trains: a student and its objectives.

Shapes: B inputs, L samples of a waveform, W values in all targets of an input.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeGuard, TypeVar, cast

import torch
from composer.models import ComposerModel
from torch import Tensor, cat

from d2v_composer.models.backbone import (
    Backbone,
    check_tensors,
    expect_no_frozen_tensors,
    freeze_unused_parameters,
    frozen_prefixes,
    keep_trained_tensors,
)
from d2v_composer.models.encoder import Inputs, Tokens, count_flop
from d2v_composer.models.precision import cpu_autocast
from d2v_composer.models.teacher import Teacher
from d2v_composer.objectives import build_objectives
from d2v_composer.objectives.objective import Outputs, Regression

Batch = Tensor | Mapping[str, Tensor]
EmbeddingT = TypeVar("EmbeddingT")


def has_targets(batch: Batch) -> TypeGuard[Mapping[str, Tensor]]:
    """Return True if a batch has the targets of its inputs."""
    return isinstance(batch, Mapping) and "targets" in batch


class DistillationModel(ComposerModel):
    """Train a student to predict the targets of a frozen teacher.

    The loss of the thesis chapter is the mean of (prediction - target)² over inputs, tokens and channels. Target and
    prediction are ``norm_mean(F) = LayerNorm(mean_l InstanceNorm(F_l))``, with F_l the FFN output of block l: the
    teacher's last ``average_top_k_layers`` blocks for the target, the student's blocks for the prediction. InstanceNorm
    is over the tokens of an input, LayerNorm over the channels of a token; the two norms have no weights, use
    eps 1e-5, and compute in float32.

        Inputs ─ encoder ─┬─ teacher ─ Features ─ target ─────┐
                          │                                   ├─ loss · weight, summed over objectives
                          └─ student ─ Features ─ prediction ─┘

    Parameters of the student on which no loss depends are frozen. Checkpoints leave out the teacher, and the student's
    encoder and alignment if they are frozen.

    Sources: data2vec 2.0 (Baevski et al. 2022, arXiv:2212.07525, section 3; fairseq's ``make_targets``) for the target;
    the thesis chapter *distilled unimodal data2vec 2.0* (github.com/TimCares/MasterThesis) for the shared encoder and
    the loss over all tokens.

    A batch is a tensor of inputs, or a dict with the tensor as ``image`` or ``audio``. Images are (B, 3, height,
    width), uint8 or normalized float; audio is (B, L) float. If clips are padded, the dict also has ``lengths``, (B,)
    int64. With ``keeps_targets``, the dict may have ``targets``, (B, W) float16: the ``kept_targets`` of an earlier
    step with the same inputs. Then the teacher does not run.

    Args:
        teacher: The frozen teacher.
        student: The student, which may share the teacher's encoder.
        objectives: Name of each objective → its section in a YAML; default: ``tokens`` alone.
        cpu_bf16: Compute in bfloat16 autocast on a CPU.
        keeps_targets: Let ``forward`` return ``kept_targets``, and round all targets to float16.

    Attributes:
        flop: Operator → number of its operations in a step with one input; see
            :func:`~d2v_composer.models.encoder.count_flop`.
        teacher_flop: Number of operations that an input's kept targets save; 0 without ``keeps_targets``.
        target_shapes: Objective → shape of an input's target; empty without ``keeps_targets``.

    Raises:
        InputError: An option of an objective is unknown, or has a value that is not allowed with these models.

    Example:
        >>> teacher = load_teacher("teacher.safetensors")
        >>> model = DistillationModel(teacher, teacher.build_student(depth=2))
        >>> loss = model.loss(model(images), images)  # or pass the model to Composer's Trainer
    """

    def __init__(
        self,
        teacher: Teacher,
        student: Backbone,
        objectives: Mapping[str, object] = {"tokens": {}},
        cpu_bf16: bool = False,
        keeps_targets: bool = False,
    ) -> None:
        super().__init__()
        self.teacher: Any = teacher  # an instance of the given class
        self.student: Any = student
        self.cpu_bf16, self.keeps_targets = cpu_bf16, keeps_targets
        self.objectives: Any = build_objectives(objectives, teacher, student)  # torch's type forgets their class
        self.target_shapes: dict[str, torch.Size] = {}
        self.teacher_flop = self._try_teacher() if keeps_targets else 0
        self.flop = count_flop(student, self._freeze_unused)  # which takes a step with one input
        # Frozen, and equal on all ranks: DDP would broadcast them before every forward pass.
        frozen = frozen_prefixes(self)
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers() if name.startswith(frozen)]
        # Hooks instead of overrides: DDP's wrapper calls only the hooks of inner modules.
        self.register_state_dict_post_hook(keep_trained_tensors)
        self.register_load_state_dict_pre_hook(check_tensors)
        self.register_load_state_dict_post_hook(expect_no_frozen_tensors)

    def _freeze_unused(self) -> None:
        freeze_unused_parameters(self, self.losses(self(self.student.encoder.example(1)).regressions)["total"])

    @torch.no_grad()
    def _try_teacher(self) -> int:
        """Record the shapes of one input's targets, and return the number of operations that compute the targets.

        The operations of an encoder that the student shares are left out.
        """
        encoder = self.teacher.encoder
        encode = partial(encoder, Inputs(encoder.example(1)))
        tokens = encode()
        self.target_shapes = {name: target.shape[1:] for name, target in self.targets_of(tokens).items()}
        flop = sum(count_flop(self.teacher, partial(self.targets_of, tokens)).values())
        return flop if self.student.encoder is encoder else flop + sum(count_flop(encoder, encode).values())

    @property
    def compares_microbatches(self) -> bool:
        """True if the loss depends on which inputs are in the same microbatch."""
        return any(objective.compares == "microbatch" for objective in self.objectives.values())

    def forward(self, batch: Batch) -> Outputs:
        """Compute the regression of each objective from a batch."""
        with cpu_autocast(self.cpu_bf16):
            inputs = self.inputs_of(batch)
            tokens = kept = None
            if has_targets(batch):
                targets = self.split_targets(batch["targets"])
            else:
                tokens, targets = self.frozen_pass(inputs)
                if self.keeps_targets:
                    kept = cat([target.flatten(1) for target in targets.values()], dim=1).half()
                    targets = self.split_targets(kept)
            features = self.student.features(self.student.encoder(inputs) if tokens is None else tokens)
            features = features.for_readers(len(targets))
            regressions = {
                name: objective.regression(features, targets[name]) for name, objective in self.objectives.items()
            }
        return Outputs(regressions, kept)

    def inputs_of(self, batch: Batch) -> Inputs:
        if isinstance(batch, Tensor):
            return Inputs(batch)
        return Inputs(batch[self.student.encoder.config.modality], batch.get("lengths"))

    def split_targets(self, kept: Tensor) -> dict[str, Tensor]:
        """Return the target of each objective, float32, from ``kept_targets``, (B, W)."""
        parts = kept.float().split([shape.numel() for shape in self.target_shapes.values()], dim=1)
        shapes = self.target_shapes.items()
        return {name: part.unflatten(1, shape) for (name, shape), part in zip(shapes, parts, strict=True)}

    @torch.no_grad()
    def frozen_pass(self, inputs: Inputs) -> tuple[Tokens | None, dict[str, Tensor]]:
        """Return the shared encoder's tokens, or ``None`` if no encoder is shared, and each objective's target."""
        tokens = self.teacher.encoder(inputs)
        return tokens if self.student.encoder is self.teacher.encoder else None, self.targets_of(tokens)

    def targets_of(self, tokens: Tokens) -> dict[str, Tensor]:
        """Return the target of each objective, from the tokens of the teacher's encoder."""
        features = self.teacher.features(tokens).for_readers(len(self.objectives))
        return {name: objective.target(features) for name, objective in self.objectives.items()}

    def loss(self, outputs: Outputs, batch: Batch) -> Any:  # Composer takes a dict, too, but its type does not say so
        """Return the loss, a scalar; for several objectives, return the result of :meth:`losses`."""
        losses = self.losses(outputs.regressions)
        return losses if len(outputs.regressions) > 1 else losses["total"]

    def losses(self, regressions: dict[str, Regression]) -> dict[str, Tensor]:
        """Return each objective's loss by name, and the weighted sum of all losses as ``total``."""
        device = next(iter(regressions.values())).target.device
        with torch.autocast(device.type, enabled=False):
            losses = {name: objective.loss(regressions[name]) for name, objective in self.objectives.items()}
        total = sum(objective.weight * losses[name] for name, objective in self.objectives.items())
        return {**losses, "total": cast("Tensor", total)}

    def embed_all(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Return the student's embeddings; see :meth:`~d2v_composer.models.backbone.Backbone.embed_all`."""
        return self.compute(self.student.embed_all, *inputs)

    def compute(self, function: Callable[..., EmbeddingT], *inputs: Tensor | None) -> EmbeddingT:
        """Call a function in bfloat16 autocast if ``cpu_bf16``, else in the caller's precision."""
        with cpu_autocast(self.cpu_bf16):
            return function(*inputs)

    def flops_per_batch(self, batch: Batch) -> int:
        """Return the number of operations in a training step; for audio, an estimate."""
        inputs, encoder = self.inputs_of(batch).values, self.teacher.encoder
        length = encoder.num_tokens(inputs.shape[1:]) / encoder.num_tokens()
        attention = self.flop.get(torch.ops.aten.bmm, 0)
        flop = (sum(self.flop.values()) - attention) * length + attention * length**2
        return round((flop - has_targets(batch) * self.teacher_flop) * len(inputs))

    def retrieval_baselines(self) -> dict[str, Callable[..., dict[str, Tensor]]]:
        """Return ``teacher`` → a function that computes the teacher's embeddings of a batch."""
        return {"teacher": partial(self.compute, partial(self.teacher.embed_all, layer_mean=self.student.layer_mean))}
