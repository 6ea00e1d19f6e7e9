"""The model that Composer trains: teacher and student on one encoder.

Shapes: B inputs, S pixels per side, E extra tokens, N patches or frames, T = E + N tokens, D channels, L layers.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
from composer.models import ComposerModel
from torch import Tensor

from d2v_composer.models.attention import init_linear_layers, linear_weights
from d2v_composer.models.names import Prediction
from d2v_composer.models.sizes import check_choice
from d2v_composer.models.student import Student
from d2v_composer.models.targets import Regression, regression_loss
from d2v_composer.models.teacher import ExtraTokens, TargetSource, Teacher
from d2v_composer.system.errors import InputError

Batch = Tensor | Mapping[str, Any]
EmbeddingT = TypeVar("EmbeddingT")

FROZEN = ("teacher.", "student.encoder.")


class DistillationModel(ComposerModel):
    """Regress the teacher's targets with the student's prediction; the encoder runs once per step for both.

    The loss is the mean of (prediction - target)² over inputs, tokens and channels. Target and prediction are
    ``norm_mean(F) = LayerNorm(mean_l InstanceNorm(F_l))``, with F_l the FFN output of block l: the teacher's last K
    blocks for the target, the student's blocks for the prediction. InstanceNorm is over the tokens of an image,
    LayerNorm over the channels of a token; both have no weights, eps 1e-5, and compute in float32.

    Source: the target is data2vec 2.0's (Baevski et al. 2022, arXiv:2212.07525, section 3; fairseq's ``make_targets``).
    Shared encoder and loss over all tokens are those of the thesis chapter *distilled unimodal data2vec 2.0*
    (github.com/TimCares/MasterThesis).

    The student's config may replace InstanceNorm by LayerNorm. The teacher's ``layer_mean`` embeddings then follow, so
    that both compare.

    A batch is a dict with ``image``, or the images themselves: (B, 3, S, S), float already normalized or uint8. With an
    audio teacher it has ``audio``, (B, L) float, and, if clips are padded, ``lengths``, (B,) int64. Labels and other
    entries are not read.

    Checkpoints hold only what trains: the student without its encoder. Loading verifies that they are complete, even
    with ``strict=False``, which Composer uses.

    Args:
        teacher: Frozen.
        student: On the teacher's encoder.
        prediction: ``layer_mean``: norm_mean of the student's FFN outputs, like the target; ``last_block``: the last
            block's output, not normalized.
        extra_tokens: ``regress`` all tokens alike; ``drop``, as in data2vec 2.0's pre-training: exclude the extra
            tokens from InstanceNorm and the loss, and regress CLS, if there is one, to the mean
            target with weight 0.01; ``only``: regress no patch.
        average_top_k_layers: Number of the teacher's last blocks in the target; default the teacher's.
        cpu_bf16: Compute in bfloat16 autocast on a CPU, where Composer's Trainer only accepts fp32.
        target_source: F of the target: the teacher's FFN outputs, ``ffn``, or its blocks' outputs, ``block``.
        final_layer_norm: End target, prediction and ``layer_mean`` with a LayerNorm; default the student's config,
            which is by default the teacher's.

    Attributes:
        regression_loss: :func:`~d2v_composer.models.targets.regression_loss`, or its compiled version.
        forward_methods: Methods besides ``forward`` that run encoder or blocks, for FSDP's hooks.

    Raises:
        ValueError: Teacher and student do not share an encoder, or an option's value is unknown.

    Example:
        >>> teacher = load_teacher("teacher.safetensors")
        >>> model = DistillationModel(teacher, teacher.build_student(depth=2))
        >>> loss = model.loss(model(images), images)  # or pass the model to Composer's Trainer
    """

    forward_methods = ("compute",)

    def __init__(
        self,
        teacher: Teacher,
        student: Student,
        prediction: Prediction = "layer_mean",
        extra_tokens: ExtraTokens = "regress",
        average_top_k_layers: int | None = None,
        cpu_bf16: bool = False,
        target_source: TargetSource = "ffn",
        final_layer_norm: bool | None = None,
    ) -> None:
        super().__init__()
        if student.encoder is not teacher.encoder:
            raise ValueError("teacher and student must share one encoder: build the student with teacher.build_student")
        check_choice("prediction", prediction, Prediction)
        check_choice("extra_tokens", extra_tokens, ExtraTokens)
        check_choice("target_source", target_source, TargetSource)
        if extra_tokens == "only" and not student.num_extra_tokens:
            raise ValueError("extra_tokens: 'only' needs extra tokens, and this teacher has none")
        self.teacher = teacher
        self.student = student
        self.prediction = prediction
        self.extra_tokens: ExtraTokens = extra_tokens
        self.average_top_k_layers = average_top_k_layers
        self.cpu_bf16 = cpu_bf16
        self.target_source: TargetSource = target_source
        if final_layer_norm is not None:
            student.config = replace(student.config, final_layer_norm=final_layer_norm)
            student.final_layer_norm = final_layer_norm
        teacher.follow(student)
        self.regression_loss = regression_loss
        if student.embed_dim < teacher.embed_dim and isinstance(student.exit, torch.nn.Identity):
            student.exit = init_linear_layers(torch.nn.Linear(student.embed_dim, teacher.embed_dim))
        # No FFN output depends on the last norm, and DDP refuses trainable parameters without gradient.
        student.blocks[-1].norm2.requires_grad_(prediction == "last_block")
        # Frozen, and equal on all ranks: DDP would broadcast them before every forward pass.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        # Hooks instead of overrides: DDP's wrapper calls only the hooks of inner modules.
        self.register_state_dict_post_hook(keep_trained_tensors)
        self.register_load_state_dict_pre_hook(check_tensors)
        self.register_load_state_dict_post_hook(expect_no_frozen_tensors)

    def forward(self, batch: Batch) -> Regression:
        """Compute prediction and target of a batch."""
        with cpu_autocast(self.cpu_bf16):
            inputs, lengths = self.inputs_of(batch)
            x_BTD, target = self.frozen_pass(inputs, lengths)
            padding_mask = self.teacher.padding_mask(lengths, inputs.shape[-1])
            prediction = self.predict(x_BTD, padding_mask)
        has_cls_loss = self.extra_tokens == "drop" and self.student.has_cls_token
        cls_prediction = prediction[:, 0] if has_cls_loss else None
        padding_mask = None if padding_mask is None else padding_mask[:, self.regressed]
        return Regression(prediction[:, self.regressed], target, cls_prediction, padding_mask)

    def inputs_of(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the inputs of a batch, and their lengths if some are padded."""
        if isinstance(batch, Tensor):
            return batch, None
        return batch[self.teacher.encoder.config.modality], batch.get("lengths")

    def frozen_pass(self, inputs: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the encoder's output and the target, without gradient."""
        x_BTD, mask = self.teacher.encode(inputs, lengths), self.teacher.padding_mask(lengths, inputs.shape[-1])
        options = self.extra_tokens, self.average_top_k_layers, self.target_source
        normalizations = self.student.normalization, self.student.final_layer_norm
        return x_BTD, self.teacher.targets(x_BTD, *options, *normalizations, mask)

    @property
    def ignored_tokens(self) -> int:
        """Number of leading tokens excluded from target and statistics."""
        return self.student.num_extra_tokens if self.extra_tokens == "drop" else 0

    @property
    def regressed(self) -> slice:
        """The tokens in the loss."""
        return slice(self.student.num_extra_tokens) if self.extra_tokens == "only" else slice(self.ignored_tokens, None)

    def predict(self, x_BTD: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Compute the student's prediction from the encoder's output, (B, T, D)."""
        student = self.student
        if self.prediction == "last_block":
            return student.exit(student.forward_blocks(x_BTD, padding_mask)[0])
        # The same statistics as the target's: of the patches alone if extra tokens are dropped.
        layers = map(student.exit, student.ffn_outputs(x_BTD, padding_mask))
        return student.layer_mean(layers, self.ignored_tokens, padding_mask)

    def loss(self, outputs: Regression, batch: Batch) -> Tensor:
        """Return the mean squared error, a scalar; ``batch`` is unused."""
        return self.regression_loss(outputs)

    def get_metrics(self, is_train: bool) -> dict[str, Any]:
        return {}  # a callback measures retrieval; the Trainer logs the loss

    def embed_all(self, images: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """Return the student's embeddings; see :meth:`~d2v_composer.models.transformer.Transformer.embed_all`."""
        return self.in_precision(self.student.embed_all)(images, lengths)

    def retrieval_baselines(self) -> dict[str, Callable[..., dict[str, Tensor]]]:
        """Return the models to compare the student with: the teacher."""
        return {"teacher": self.in_precision(self.teacher.embed_all)}

    def in_precision(self, function: Callable[..., EmbeddingT]) -> Callable[..., EmbeddingT]:
        """Wrap a function of this model's parts so that it runs in the model's precision."""
        # Look up the method at each call: FSDP replaces it after evaluations are set up.
        return lambda *inputs: self.compute(function, *inputs)

    def compute(self, function: Callable[..., EmbeddingT], *inputs: Tensor | None) -> EmbeddingT:
        """Call a function in the model's precision; see :meth:`in_precision`."""
        with cpu_autocast(self.cpu_bf16):
            return function(*inputs)

    def flops_per_batch(self, batch: Batch) -> int:
        """Return the operations of a training step (2 per multiply-accumulate), in linear layers and attention."""
        inputs, _ = self.inputs_of(batch)
        encoder, shape = self.teacher.encoder, inputs.shape[1:]
        macs = (
            encoder.forward_macs(shape)
            + self.teacher.forward_macs(shape)
            + self.student.forward_macs(shape)
            + self.student.backward_macs(shape)
        )
        num_exits = 1 if self.prediction == "last_block" else len(self.student.blocks)
        macs += 3 * num_exits * encoder.num_tokens(shape) * linear_weights(self.student.exit)
        return 2 * macs * len(inputs)


def cpu_autocast(is_on: bool) -> AbstractContextManager[Any]:
    """Return a context in which a CPU computes in bfloat16 if ``is_on``."""
    # Not autocast(enabled=False), which would disable the caller's.
    return torch.autocast("cpu", torch.bfloat16) if is_on else nullcontext()


def keep_trained_tensors(module: torch.nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """Remove all tensors that do not train from a state dict."""
    for name in [name for name in state_dict if name.startswith(tuple(prefix + frozen for frozen in FROZEN))]:
        del state_dict[name]


def check_tensors(module: torch.nn.Module, state_dict: dict, prefix: str, *args: Any) -> None:
    """Check that a state dict has exactly a module's tensors, because Composer may load without ``strict``.

    Raises:
        InputError: A tensor is missing, unknown or misshapen.
    """
    found, expected = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith(prefix)}
        for tensors in (state_dict, module.state_dict(prefix=prefix))
    )
    if different := sorted(found.items() ^ expected.items()):
        name, _ = different[0]
        shapes = [each.get(name, "none") for each in (found, expected)]
        raise InputError(f"tensor {name}: checkpoint has {shapes[0]}, model has {shapes[1]}")


def expect_no_frozen_tensors(module: torch.nn.Module, incompatible_keys: Any) -> None:
    """Let strict loading accept a state dict without the frozen parts."""
    incompatible_keys.missing_keys.clear()
