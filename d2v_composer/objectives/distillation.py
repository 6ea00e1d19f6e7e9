"""The model that Composer trains: a student and its objectives.

Shapes: B inputs, L samples of a waveform.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar, cast

import torch
from composer.models import ComposerModel
from torch import Tensor

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
from d2v_composer.objectives.objective import Regression

Batch = Tensor | Mapping[str, Tensor]
EmbeddingT = TypeVar("EmbeddingT")


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
    int64.

    Args:
        teacher: The frozen teacher.
        student: The student, which may share the teacher's encoder.
        objectives: Name of each objective → its section in a YAML; default: ``tokens`` alone.
        cpu_bf16: Compute in bfloat16 autocast on a CPU.

    Attributes:
        flop: Operator → number of its operations in a step with one input; see
            :func:`~d2v_composer.models.encoder.count_flop`.

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
    ) -> None:
        super().__init__()
        self.teacher: Any = teacher  # an instance of the given class
        self.student: Any = student
        self.cpu_bf16 = cpu_bf16
        self.objectives: Any = build_objectives(objectives, teacher, student)  # torch's type forgets their class
        self.flop = count_flop(student, self._freeze_unused)  # which takes a step with one input
        # Frozen, and equal on all ranks: DDP would broadcast them before every forward pass.
        frozen = frozen_prefixes(self)
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers() if name.startswith(frozen)]
        # Hooks instead of overrides: DDP's wrapper calls only the hooks of inner modules.
        self.register_state_dict_post_hook(keep_trained_tensors)
        self.register_load_state_dict_pre_hook(check_tensors)
        self.register_load_state_dict_post_hook(expect_no_frozen_tensors)

    def _freeze_unused(self) -> None:
        freeze_unused_parameters(self, self.losses(self(self.student.encoder.example(1)))["total"])

    def forward(self, batch: Batch) -> dict[str, Regression]:
        """Compute the regression of each objective from a batch."""
        with cpu_autocast(self.cpu_bf16):
            inputs = self.inputs_of(batch)
            tokens, targets = self.frozen_pass(inputs)
            features = self.student.features(self.student.encoder(inputs) if tokens is None else tokens)
            features = features.for_readers(len(targets))
            return {name: objective.regression(features, targets[name]) for name, objective in self.objectives.items()}

    def inputs_of(self, batch: Batch) -> Inputs:
        if isinstance(batch, Tensor):
            return Inputs(batch)
        return Inputs(batch[self.student.encoder.config.modality], batch.get("lengths"))

    @torch.no_grad()
    def frozen_pass(self, inputs: Inputs) -> tuple[Tokens | None, dict[str, Tensor]]:
        """Return the shared encoder's tokens, or ``None`` if no encoder is shared, and each objective's target."""
        tokens = self.teacher.encoder(inputs)
        return tokens if self.student.encoder is self.teacher.encoder else None, self.targets_of(tokens)

    def targets_of(self, tokens: Tokens) -> dict[str, Tensor]:
        """Return the target of each objective, from the tokens of the teacher's encoder."""
        features = self.teacher.features(tokens).for_readers(len(self.objectives))
        return {name: objective.target(features) for name, objective in self.objectives.items()}

    # Composer takes a dict, too, but its type does not say so.
    def loss(self, outputs: dict[str, Regression], batch: Batch) -> Any:
        """Return the loss, a scalar; for several objectives, return the result of :meth:`losses`."""
        losses = self.losses(outputs)
        return losses if len(outputs) > 1 else losses["total"]

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
        return round(flop * len(inputs))

    def retrieval_baselines(self) -> dict[str, Callable[..., dict[str, Tensor]]]:
        """Return ``teacher`` → a function that computes the teacher's embeddings of a batch."""
        return {"teacher": partial(self.compute, partial(self.teacher.embed_all, layer_mean=self.student.layer_mean))}
