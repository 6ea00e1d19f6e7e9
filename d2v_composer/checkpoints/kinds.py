"""The kinds of students in files: blocks on an encoder, or a whole timm model. How each is described, built and saved.

A file's metadata have the sizes. timm reads the tensors alone, so blocks have their sizes in a tensor, too,
``config_json``; a timm model's tensors have timm's own names.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from d2v_composer.checkpoints.student_file import build_loaded, choose_embedding, read_config
from d2v_composer.models.backbone import Backbone
from d2v_composer.models.configs import (
    EncoderConfig,
    NetworkSizes,
    StudentSizes,
    TimmConfig,
    TimmEncoderConfig,
    TimmNetworkConfig,
)
from d2v_composer.models.data2vec2 import ENCODERS
from d2v_composer.models.embeddings import PROJECTED, Embedding
from d2v_composer.models.encoder import Encoder
from d2v_composer.models.images import is_same
from d2v_composer.models.names import timm_name
from d2v_composer.models.student import Student
from d2v_composer.system.errors import errors_of, reading

CONFIG_TENSOR = "config_json"


def sizes_of(student: Backbone) -> dict[str, Any]:
    """Return the sizes of a student and its encoder, for JSON."""
    config = student.encoder.config
    is_network = isinstance(config, TimmNetworkConfig)
    sizes = NetworkSizes(network=config) if is_network else StudentSizes(encoder=config, student=student.config)
    return sizes.model_dump(mode="json")


def read_sizes(source: Any, stored: dict[str, Any]) -> NetworkSizes | StudentSizes:
    """Read what :func:`sizes_of` returned.

    Raises:
        InputError: They are not the sizes of a student.
    """
    with reading(source):
        return read_config(NetworkSizes if "network" in stored else StudentSizes, stored)


def build_student(
    source: Any, sizes: NetworkSizes | StudentSizes, tensors: Mapping[str, Tensor], provenance: Any = None
) -> Any:
    """Build a student with a state dict, in eval mode.

    Raises:
        InputError: As :func:`~d2v_composer.checkpoints.student_file.check_fits`.
    """

    def build() -> Backbone:
        if isinstance(sizes, StudentSizes):
            return Student(build_encoder(sizes.encoder), sizes.student, provenance)
        with torch.device("cpu"):  # torch._dynamo cannot be imported on the meta device
            from d2v_composer.models.timm_network import NetworkStudent  # timm takes seconds to import

        return NetworkStudent(sizes.network, provenance)

    return build_loaded(source, build, tensors).eval()


def check_outputs(source: Any, encoder: Any) -> None:
    """Check that a timm encoder computes what it did at export, since timm's version may differ.

    Raises:
        InputError: It computes something else.
    """
    config = encoder.config
    if isinstance(config, TimmConfig) and config.outputs:
        with reading(source):
            if not is_same(torch.tensor(encoder.sample_outputs()), torch.tensor(config.outputs)):
                raise ValueError(
                    f"the installed timm gives different results for {config.model} than timm {config.timm!r:.30}, "
                    "which exported it: install that version"
                )


def build_encoder(config: EncoderConfig) -> Encoder:
    """Build a frozen encoder of any kind, to load a state dict into."""
    if type(config) in ENCODERS:
        return ENCODERS[type(config)](config).freeze()
    assert isinstance(config, TimmEncoderConfig)
    with torch.device("cpu"):  # as above
        from d2v_composer.models.timm_teacher import TimmEncoder

    return TimmEncoder(config).freeze()


def convert_to_timm(source: Any, student: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a student's sizes and tensors for a file, once timm has computed with them what the student does.

    They are compared on one input: the logits of a head, else the embedding that timm returns.

    Args:
        source: Named in errors.
        student: Perhaps with a head, which reads the primary embedding.

    Raises:
        InputError: timm computes something else.
    """
    import timm  # takes seconds

    student = copy.deepcopy(student).cpu().eval()
    encoder, embedding = student.encoder, choose_embedding(student, None, None)
    if isinstance(encoder.config, TimmConfig):
        encoder.config = encoder.config.changed(timm=timm.__version__, outputs=encoder.sample_outputs())
    sizes, (name, options) = sizes_of(student), timm_arguments(student)
    has_logits = isinstance(student.head, nn.Linear)
    rule = "a classifier must be one linear layer on output_cls"
    with errors_of(f"{source}: timm would compute something else; {rule}"), torch.no_grad():
        model: Any = timm.create_model(name, **options)
        if isinstance(encoder.config, TimmNetworkConfig):
            tensors = encoder.timm_tensors(model, student.head)
            returned = PROJECTED if student.projected_width else "output_cls"
        else:
            tensors = student.state_dict() | {CONFIG_TENSOR: config_tensor(sizes, embedding)}
            returned = embedding.name
        model.load_state_dict(tensors)
        inputs = torch.randn_like(encoder.example(1))
        embeddings = student.embed_all(inputs)
        expected = student.head(embeddings[embedding.name]) if has_logits else embeddings[returned]
        features = model.eval().forward_features(inputs)
        if not is_same(model.forward_head(features, pre_logits=not has_logits and returned != PROJECTED), expected):
            raise ValueError("the outputs differ")
    return sizes, tensors


def config_tensor(sizes: dict[str, Any], primary: Embedding) -> Tensor:
    """Return a student's sizes and primary embedding as JSON bytes, uint8."""
    return torch.tensor(list(json.dumps(sizes | {"primary": primary._asdict()}).encode()), dtype=torch.uint8)


def timm_arguments(student: Backbone) -> tuple[str, dict[str, Any]]:
    """Return the name and the options with which ``timm.create_model`` builds a student, to load its file."""
    classes = {"num_classes": student.head.out_features} if isinstance(student.head, nn.Linear) else {}
    if not isinstance(student.config, TimmNetworkConfig):
        return "d2v2_student", classes
    return timm_name(student.config.model), cast("Any", student.encoder).options | classes


def timm_call(student: Backbone, file: str | Path) -> str:
    """Return the line of Python with which timm loads a student's file."""
    name, options = timm_arguments(student)
    options |= {"checkpoint_path": str(file)}
    given = [f"{key}={value!r}" for key, value in options.items() if value is not None]
    return f"timm.create_model({', '.join([repr(name), *given])})"
