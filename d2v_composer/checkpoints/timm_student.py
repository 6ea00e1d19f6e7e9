"""Convert students for timm, and give timm's interface to students that are not timm models."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from d2v_composer.checkpoints.model_file import (
    CONFIG_TENSOR,
    ModelName,
    Tensors,
    build_student,
    check_timm_outputs,
    config_tensor,
    parse_object,
    read_config,
    sizes_of,
)
from d2v_composer.models.alignment import side_by_side
from d2v_composer.models.backbone import Backbone
from d2v_composer.models.configs import StudentSizes, TimmConfig, TimmNetworkConfig, height_and_width
from d2v_composer.models.encoder import Tokens
from d2v_composer.models.features import Features
from d2v_composer.models.names import Representation, timm_name
from d2v_composer.models.precision import is_equal_but_for_rounding
from d2v_composer.models.provenance import Record
from d2v_composer.system.errors import InputError, errors_of, reading

NAME = "d2v2_student"
"""The name by which timm creates a :class:`TimmWrapper`."""
# timm's names of poolings.
POOLINGS = {"token": "cls", "avg": "mean_patches"}


def convert_to_timm(source: ModelName, student: Backbone) -> tuple[Record, Tensors]:
    """Return a student's sizes and tensors for a file, after a check that timm computes the same outputs with them."""
    import timm  # takes seconds

    from d2v_composer.models.timm_network import TimmBackbone

    student = copy.deepcopy(student).cpu().eval()
    encoder = student.encoder
    if isinstance(encoder.config, TimmConfig):
        encoder.config = encoder.config.changed(timm=timm.__version__, outputs=student.sample_outputs())
    sizes, (name, options) = sizes_of(student), timm_arguments(student)
    rule = " (a classifier or alignment must be one linear layer on output_cls)" if options["num_classes"] else ""
    with errors_of(f"{source}: timm would not compute what the student computes{rule}"), torch.no_grad():
        model: nn.Module
        if isinstance(encoder, TimmBackbone):
            model = timm.create_model(name, **options)
            tensors = encoder.timm_tensors(model, student.head or student.alignment)
        else:
            model = TimmWrapper(**options)
            tensors = student.state_dict() | {CONFIG_TENSOR: config_tensor(sizes)}
        model.load_state_dict(tensors)
        inputs = torch.randn_like(encoder.example(1))
        expected = student.embed(inputs)
        expected = student.head(expected) if isinstance(student.head, nn.Linear) else expected
        if not is_equal_but_for_rounding(model.eval()(inputs), expected):
            raise ValueError("the outputs differ")
    return sizes, tensors


def timm_arguments(student: Backbone) -> tuple[str, Record]:
    """Return the name and the options with which ``timm.create_model`` can load a student's file."""
    if isinstance(student.head, nn.Linear):
        classes = {"num_classes": student.head.out_features}
    else:
        classes = {"num_classes": 0 if student.alignment is None else student.embedding.width}
    if not isinstance(student.config, TimmNetworkConfig):
        return NAME, classes
    from d2v_composer.models.timm_network import TimmBackbone  # timm takes seconds to import

    assert isinstance(student.encoder, TimmBackbone)
    return timm_name(student.config.model), student.encoder.options | classes


def timm_call(student: Backbone, file: str | Path) -> str:
    """Return the line of Python with which timm loads a student's file."""
    name, options = timm_arguments(student)
    options |= {"checkpoint_path": str(file)}
    arguments = [f"{key}={value!r}" for key, value in options.items() if value is not None]
    return f"timm.create_model({', '.join([repr(name), *arguments])})"


class TimmWrapper(nn.Module):
    """timm's interface to a :class:`~d2v_composer.models.student.Student`.

    The student is built when a file that ``d2v export`` wrote is loaded. The student's encoder stays frozen.

    Args:
        num_classes: Number of the head's outputs. If this is the width of the file's alignment, the head is the
            alignment. If this is 0, the model has no head and returns the pooled features. Otherwise, the head is the
            file's classifier or, if the file has no classifier, a new head of zeros.
        global_pool: ``token``: the CLS token; ``avg``: the mean of the patches; ``mean``: the mean of all tokens.
        representation: ``output``: the last block's output; ``layer_mean``: the mean of the blocks' normalized
            FFN outputs. Without this argument and ``global_pool``, the head gets the pooled features that the file's
            alignment reads or, without an alignment, the student's embedding.
    """

    def __init__(
        self, num_classes: int = 0, global_pool: Any = None, representation: Representation | None = None
    ) -> None:
        super().__init__()
        self.num_classes, self.global_pool, self.representation = num_classes, global_pool, representation
        self.student: Any = None  # a Student, once a file is loaded; its StudentSizes
        self.sizes: Any = None
        self.head: nn.Module = nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head with a zero-initialized head, or remove the head if ``num_classes`` is 0.

        Raises:
            InputError: The student has no embedding with the chosen pooling and representation.
        """
        student, self.global_pool = self.student, global_pool or self.global_pool
        pooling: Any = POOLINGS.get(self.global_pool, self.global_pool)
        if pooling or self.representation:
            self.pooled = [student.choose_embedding(pooling, self.representation)]
        else:
            is_raw = self.sizes.embedding.made_by == "raw"
            self.pooled = [student.raw_embedding] if is_raw else student.alignment_inputs
        self.representations: list[Representation] = [
            kind for kind in get_args(Representation) if any(name.startswith(kind) for name in self.pooled)
        ]
        # DDP refuses trainable parameters without gradient.
        student.blocks[-1].norm2.requires_grad_("output" in self.representations)
        self.num_features = student.embed_dim * len(self.representations)
        if (sizes := student.encoder.config).modality == "image":
            reduction = height_and_width(sizes.image_size)[0] // sizes.grid_size[0]
            self.feature_info = [{"num_chs": self.num_features, "reduction": reduction, "module": "blocks"}]
        self.head_hidden_size = sum(map(student.width_of, self.pooled))
        self.num_classes = num_classes
        self.head = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        """Map normalized images, (B, 3, height, width), or waveforms, (B, L), to features, (B, T, D).

        If the head reads two representations, the features are concatenated, (B, T, 2 D).
        """
        student = self.student
        features = student.features(Tokens(student.encode(x)))
        if len(self.representations) == 1:
            return student.represent(features, *self.representations)
        output_and_mean = features.with_output(lambda layers: student.layer_mean(layers, features))
        return torch.cat(output_and_mean, dim=-1)

    def forward_intermediates(
        self, x: Tensor, indices: object = None, output_fmt: str = "NCHW", intermediates_only: bool = False, **_: object
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the features of images, and a list of one feature map, for timm's ``features_only``.

        Args:
            x: Normalized images, (B, 3, height, width).
            indices: Not used, because there is one map.
            output_fmt: ``NCHW``: the map is (B, C, rows, columns); ``NLC``: (B, rows · columns, C).
            intermediates_only: Return only the list.
        """
        features = self.forward_features(x)
        cells = features[:, self.student.num_extra_tokens :]
        if output_fmt == "NCHW":
            cells = cells.transpose(1, 2).unflatten(2, self.student.encoder.config.grid_size)
        return [cells] if intermediates_only else (features, [cells])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features to the head's outputs, or with ``pre_logits`` to pooled features, (B, ``head_hidden_size``)."""
        features = Features.of_layer(x, self.student.num_extra_tokens, self.student.has_cls_token)
        pooled = dict[str, Tensor]()
        for name, part in zip(self.representations, x.chunk(len(self.representations), dim=-1), strict=True):
            pooled |= features.poolings(part, f"{name}_")
        joined = side_by_side(pooled, self.pooled)
        return joined if pre_logits else self.head(joined)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return the patterns by which timm groups parameters for a learning rate that decays with depth."""
        return {"stem": r"^student\.encoder", "blocks": r"^student\.blocks\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.student.checkpoint_activations(enable)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Build the student from the tensors of a file that ``d2v export`` wrote, or of this model's state dict.

        Raises:
            InputError: The sizes are missing, the tensors do not fit them, or the student lacks the chosen embedding.
        """
        tensors = {name.removeprefix("student."): tensor for name, tensor in state_dict.items()}
        if (stored := tensors.pop(CONFIG_TENSOR, None)) is None:
            raise InputError(f"no tensor {CONFIG_TENSOR}: not a file written by d2v export")
        with reading(CONFIG_TENSOR):
            sizes = read_config(StudentSizes, parse_object(stored.cpu().numpy().tobytes()))
        last = {name: tensors.pop(name) for name in [*tensors] if name.startswith(("head.", "alignment."))}
        with_raw = sizes.changed(embedding=sizes.embedding.changed(made_by="raw"))
        student = build_student(CONFIG_TENSOR, with_raw, tensors)
        check_timm_outputs(CONFIG_TENSOR, student)
        if self.sizes == sizes:  # an optimizer may hold the parameters
            self.student.load_state_dict(tensors, strict, assign)
        else:
            self.student, self.sizes = student.train(self.training), sizes
            self.register_buffer(CONFIG_TENSOR, stored)
            self.pretrained_cfg = self.default_cfg = pretrained_cfg(sizes)
            self.reset_classifier(self.num_classes)
        part = "alignment." if self.num_classes == len(last.get("alignment.bias", ())) else "head."
        tensors_of_head = {name.removeprefix(part): tensor for name, tensor in last.items() if name.startswith(part)}
        head = tensors_of_head if self.num_classes else {}
        return self.head.load_state_dict(head, bool(head), assign)


def pretrained_cfg(sizes: StudentSizes | None) -> Record:
    """Return timm's ``pretrained_cfg``, with the preprocessing that timm's ``resolve_data_config`` reads."""
    preprocessing = {} if sizes is None else sizes.encoder.timm_preprocessing
    return {"architecture": NAME, "num_classes": 0, "classifier": "head", **preprocessing}
