"""The model that Composer trains: teacher and student on one encoder.

Shapes: B images, S pixels a side, E extra tokens, N patches, T = E + N time steps, D channels.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar

import torch
from composer.models import ComposerModel
from torch import Tensor
from torch.nn.functional import cosine_similarity

from d2v_composer.models.data2vec2 import Data2Vec2, ExtraTokens
from d2v_composer.models.student import Student
from d2v_composer.models.targets import Regression, instance_norm, regression_loss
from d2v_composer.system.errors import InputError

__all__ = ["DistillationModel", "Prediction"]

Prediction = Literal["layer_mean", "last_block"]
Batch = Tensor | Mapping[str, Any]
EmbeddingT = TypeVar("EmbeddingT")

TRAINED = "student.blocks."


class DistillationModel(ComposerModel):
    """Regress the teacher's targets with the student's prediction; the encoder runs once a step for both.

    A batch is a dict with ``image``, or the images themselves: (B, 3, S, S), float already normalised or uint8.
    Nothing else of a batch is read, labels least of all.

    Checkpoints hold the student's blocks alone. Loading checks that each of their tensors arrived, also where the
    caller asked for less (Composer loads with ``strict=False``).

    Args:
        teacher: Frozen.
        student: On the teacher's own encoder.
        prediction: ``layer_mean``: norm_mean of the student's FFN outputs, as the target is made; ``last_block``:
            the last block's output as it is.
        extra_tokens: ``regress`` all time steps alike; ``drop``, as data2vec 2.0's own pre-training: the extra
            tokens are left out of InstanceNorm and of the loss, and CLS is regressed to the mean target with
            weight 0.01.
        average_top_k_layers: How many of the teacher's last blocks make the target; default the teacher's own number.
        cpu_bf16: Compute in bfloat16 under autocast on a CPU, where Composer's Trainer takes no precision but fp32.

    Attributes:
        regression_loss: :func:`~d2v_composer.models.targets.regression_loss`, or what computes the same.
        forward_methods: The methods besides ``forward`` that run encoder or blocks; FSDP has to surround each of them.

    Raises:
        ValueError: Teacher and student do not share an encoder, or an option has no such value.
    """

    forward_methods = ("compute", "layer_cosines")

    def __init__(
        self,
        teacher: Data2Vec2,
        student: Student,
        prediction: Prediction = "layer_mean",
        extra_tokens: ExtraTokens = "regress",
        average_top_k_layers: int | None = None,
        cpu_bf16: bool = False,
    ) -> None:
        super().__init__()
        if student.encoder is not teacher.encoder:
            raise ValueError("teacher and student must share one encoder: build the student with teacher.build_student")
        if prediction not in ("layer_mean", "last_block"):
            raise ValueError(f"prediction must be layer_mean or last_block, got {prediction!r}")
        if extra_tokens not in ("regress", "drop"):
            raise ValueError(f"extra_tokens must be regress or drop, got {extra_tokens!r}")
        self.teacher = teacher
        self.student = student
        self.prediction = prediction
        self.extra_tokens: ExtraTokens = extra_tokens
        self.average_top_k_layers = average_top_k_layers
        self.cpu_bf16 = cpu_bf16
        self.regression_loss = regression_loss
        # No FFN output depends on the last norm: it gets no gradient, and DDP refuses a trainable parameter without.
        student.blocks[-1].norm2.requires_grad_(prediction == "last_block")
        # Hooks, not overrides: they hold under DDP's wrapper as well, where only the inner modules' hooks are called.
        self.register_state_dict_post_hook(keep_trained_tensors)
        self.register_load_state_dict_pre_hook(check_trained_shapes)
        self.register_load_state_dict_post_hook(check_trained_tensors)

    def forward(self, batch: Batch) -> Regression:
        """Prediction and target of a batch, see :class:`~d2v_composer.models.targets.Regression`."""
        with self.cpu_autocast():
            return self.compare(images_of(batch))

    def compare(self, images: Tensor) -> Regression:
        """Prediction and target of images, in the precision of the context."""
        x = self.teacher.encode(images)
        target = self.teacher.targets(x, self.extra_tokens, self.average_top_k_layers)
        prediction = self.predict(x)
        if not self.ignored_tokens:
            return Regression(prediction, target)
        return Regression(prediction[:, self.ignored_tokens :], target, cls_prediction=prediction[:, 0])

    @property
    def ignored_tokens(self) -> int:
        """How many time steps in front are kept out of target and statistics."""
        return self.student.num_extra_tokens if self.extra_tokens == "drop" else 0

    def predict(self, x: Tensor) -> Tensor:
        """The student's prediction from what the encoder gives, (B, T, D)."""
        if self.prediction == "last_block":
            return self.student.forward_blocks(x)[0]
        # Statistics from the patches alone where the target's are, so that prediction and target mirror each other.
        return self.student.norm_mean(self.student.ffn_outputs(x), self.ignored_tokens)

    @torch.no_grad()
    def layer_cosines(self, batch: Batch, num_images: int) -> Tensor:
        """Cosine of the prediction and each of the teacher's layers by itself, (L,): which ones it resembles.

        Each FFN output is instance-normalised as in the target; the mean is over images and time steps.

        Args:
            batch: As for :meth:`forward`.
            num_images: How many of its images are looked at, the last ones.
        """
        with self.cpu_autocast():
            x = self.teacher.encode(images_of(batch)[-num_images:])
            prediction = self.predict(x)
            cosines = [
                cosine_similarity(prediction, instance_norm(layer, self.ignored_tokens), dim=2)
                for layer in self.teacher.ffn_outputs(x)
            ]
        return torch.stack([cosine_BT[:, self.ignored_tokens :].mean() for cosine_BT in cosines])

    def loss(self, outputs: Regression, batch: Batch) -> Tensor:
        """Mean squared error, a scalar; ``batch`` is not looked at."""
        return self.regression_loss(outputs)

    def get_metrics(self, is_train: bool) -> dict[str, Any]:
        return {}  # retrieval is measured by a callback; the loss is logged by the Trainer

    def embed_all(self, images: Tensor) -> dict[str, Tensor]:
        """The student's embeddings, see :meth:`~d2v_composer.models.transformer.Transformer.embed_all`."""
        return self.in_precision(self.student.embed_all)(images)

    def retrieval_references(self) -> dict[str, Callable[[Tensor], dict[str, Tensor]]]:
        """What the student is compared with: the teacher."""
        return {"teacher": self.in_precision(self.teacher.embed_all)}

    def in_precision(self, function: Callable[[Tensor], EmbeddingT]) -> Callable[[Tensor], EmbeddingT]:
        """``function``, of this model's parts, in the precision that it computes in."""
        # Looked up at each call: FSDP replaces the method after evaluations have been set up.
        return lambda images: self.compute(function, images)

    def compute(self, function: Callable[[Tensor], EmbeddingT], images: Tensor) -> EmbeddingT:
        """``function`` of images, see :meth:`in_precision`."""
        with self.cpu_autocast():
            return function(images)

    def cpu_autocast(self) -> AbstractContextManager[Any]:
        # Not autocast with enabled=False, which would end the caller's own.
        return torch.autocast("cpu", torch.bfloat16) if self.cpu_bf16 else nullcontext()

    def flops_per_batch(self, batch: Batch) -> int:
        """Operations (2 per multiply-accumulate) of one training step: the linear layers' and the attention's."""
        macs = (
            self.teacher.encoder.forward_macs()
            + self.teacher.forward_macs()
            + self.student.forward_macs()
            + self.student.backward_macs()
        )
        return 2 * macs * len(images_of(batch))


def images_of(batch: Batch) -> Tensor:
    """The images of a batch, (B, 3, S, S)."""
    return batch if isinstance(batch, Tensor) else batch["image"]


def keep_trained_tensors(module: torch.nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """Drop everything but the student's blocks from a state dict."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        if not name.startswith(prefix + TRAINED):
            del state_dict[name]


def check_trained_shapes(module: torch.nn.Module, state_dict: dict, prefix: str, *args: Any) -> None:
    """Refuse a state dict with a tensor of another shape than the student's.

    Raises:
        InputError: It names the tensor and both shapes.
    """
    for name, tensor in module.state_dict(prefix=prefix).items():
        if name in state_dict and state_dict[name].shape != tensor.shape:
            found, expected = tuple(state_dict[name].shape), tuple(tensor.shape)
            raise InputError(f"the checkpoint's tensor {name} has shape {found}, the student's is {expected}")


def check_trained_tensors(module: torch.nn.Module, incompatible_keys: Any) -> None:
    """Refuse a state dict that lacks a tensor of the student's blocks or brings an unknown one.

    Raises:
        InputError: It names the tensors.
    """
    missing = [name for name in incompatible_keys.missing_keys if TRAINED in name]
    unknown = incompatible_keys.unexpected_keys
    # The frozen parts are never in a checkpoint: strict loading need not mind.
    incompatible_keys.missing_keys[:] = missing
    if missing:
        raise InputError(f"the checkpoint lacks {len(missing)} of the student's tensors, first {missing[0]}")
    if unknown:
        raise InputError(f"the checkpoint has {len(unknown)} tensors that the student has not, first {unknown[0]}")
