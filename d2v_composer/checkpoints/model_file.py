"""Read and write model files (safetensors with a model's kind, sizes and provenance); build models from them."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from d2v_composer.models.alignment import Alignment
from d2v_composer.models.backbone import Backbone
from d2v_composer.models.configs import (
    Config,
    EmbeddingConfig,
    EncoderConfig,
    NetworkSizes,
    StudentSizes,
    TimmConfig,
    TimmEncoderConfig,
    TimmNetworkConfig,
)
from d2v_composer.models.data2vec2 import ENCODERS
from d2v_composer.models.encoder import Encoder
from d2v_composer.models.precision import is_equal_but_for_rounding
from d2v_composer.models.provenance import Record
from d2v_composer.models.student import Student
from d2v_composer.system.addresses import hide_secrets
from d2v_composer.system.errors import InputError, reading, reason
from d2v_composer.system.files import out_file

FORMAT_VERSIONS: dict[str, int] = {"teacher": 2, "student": 5, "classifier": 4}
"""Kind of file → the format version that this package writes and reads."""
# Characters of sizes or provenance. Ours have some thousands; parsed, they take 25 times as many bytes.
MAX_JSON = 4 << 20
CONFIG_TENSOR = "config_json"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DRAWS = (nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_)

Tensors = Mapping[str, Tensor]
"""Name → tensor."""
ModelName = str | Path
"""A name of a model for messages, such as the path of its file."""
ConfigT = TypeVar("ConfigT", bound=Config)
ModuleT = TypeVar("ModuleT", bound=nn.Module)


class ModelFile(NamedTuple):
    """Contents of a safetensors file; all fields but ``tensors`` are empty if another program wrote the file."""

    kind: str
    config: Record
    provenance: Record
    tensors: Tensors

    def expect(self, path: str | Path, kind: str) -> None:
        """Check that the file holds a model of the kind ``kind``, a key of ``FORMAT_VERSIONS``."""
        if self.kind != kind:
            description = f"a {self.kind} file" if self.kind in FORMAT_VERSIONS else "not a d2v_composer file"
            raise InputError(f"{path} is {description}; expected a {kind} file")


def write_model_file(
    path: Path,
    kind: str,
    config: Record,
    provenance: Record,
    tensors: Tensors,
    when_complete: Callable[[], object] = lambda: None,
) -> None:
    """Write a model's file; call ``when_complete`` when the temporary file is complete, before it is renamed."""
    metadata = {
        "format": f"d2v_composer.{kind}",
        "format_version": str(FORMAT_VERSIONS[kind]),
        "config": json.dumps(config),
        "provenance": json.dumps(hide_secrets(provenance)),
    }
    with out_file(path) as partial:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
        except SafetensorError as error:  # the disk failed
            raise OSError(reason(error)) from error
        when_complete()


def read_model_file(path: Path) -> ModelFile:
    """Read any safetensors file."""
    with reading(path):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        program, _, kind = metadata.get("format", "").partition(".")
        if program != "d2v_composer":
            return ModelFile("", {}, {}, tensors)
        if (version := metadata["format_version"]) != str(ours := FORMAT_VERSIONS[kind]):
            raise ValueError(f"its format version is {version}; this package reads {ours}")
        return ModelFile(kind, parse_object(metadata["config"]), parse_object(metadata["provenance"]), tensors)


def parse_object(text: str | bytes) -> Record:
    """Parse a JSON object of at most ``MAX_JSON`` characters or bytes."""
    if len(text) > MAX_JSON:
        raise ValueError(f"its metadata has {len(text)} characters; the limit is {MAX_JSON}")
    return dict(json.loads(text).items())


def is_safetensors(path: Path) -> bool:
    """Return True if a file starts like a safetensors file."""
    with reading(path), path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def build_loaded(source: ModelName, build: Callable[[], ModuleT], tensors: Tensors) -> ModuleT:
    """Build a model, and load ``tensors`` into the model."""
    check_fits(source, build, tensors)
    model = build()
    model.load_state_dict(tensors)
    return model


# To fill some weights on the meta device, torch would import its compiler and sympy for seconds.
class _Unset(TorchFunctionMode):
    """A mode in which new modules leave their weights unset."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DRAWS:
            return kwargs["tensor"]
        return (torch.empty if func is torch.zeros else func)(*args, **kwargs)


def check_fits(source: ModelName, build: Callable[[], nn.Module], tensors: Tensors) -> None:
    """Check that ``tensors`` are exactly those of a model, without allocating memory for the model."""
    with reading(source), torch.device("meta"), _Unset():
        model = build()
        layout = {name: torch.empty(tensor.shape) for name, tensor in tensors.items()}
        whole = [name for name, tensor in model.state_dict().items() if not tensor.is_floating_point()]
        try:
            model.load_state_dict(layout, assign=True)
        except RuntimeError as error:
            raise ValueError(loading_fault(error)) from error
        check_numbers({name: tensor for name, tensor in tensors.items() if name not in whole})


def check_numbers(tensors: Tensors) -> None:
    """Check that tensors hold finite floating-point numbers."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"tensor {name} is not a dense floating-point tensor")
        # An expanded tensor would grow to any size when it is copied.
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"tensor {name} has fewer values than its shape needs")
        if not tensor.isfinite().all():
            raise ValueError(f"tensor {name} has values that are not finite")


def loading_fault(error: Exception) -> str:
    """Return the text of an error as one line; for an error of load_state_dict, the line with the first mismatch."""
    return (str(error).splitlines()[1:] or [reason(error)])[0].strip()[:300]


def read_config(config_class: type[ConfigT], sizes: Record) -> ConfigT:
    """Validate the sizes in a file, and return them as a config."""
    config = config_class(**sizes)
    if config.model_dump(mode="json") != sizes:
        raise ValueError("its sizes are incomplete")
    return config


def sizes_of(student: Backbone) -> Record:
    """Return a student's sizes and the description of its embedding as JSON values."""
    config, info = student.encoder.config, student.embedding
    space = "" if student.alignment is None else info.space
    embedding = EmbeddingConfig(raw=student.raw_embedding, of=info.of, made_by=info.made_by, space=space)
    if isinstance(config, TimmNetworkConfig):
        return NetworkSizes(network=config, embedding=embedding).model_dump(mode="json")
    return StudentSizes(encoder=config, student=student.config, embedding=embedding).model_dump(mode="json")


def read_sizes(source: ModelName, stored: Record) -> NetworkSizes | StudentSizes:
    """Read the sizes that :func:`sizes_of` returned."""
    with reading(source):
        return read_config(NetworkSizes if "network" in stored else StudentSizes, stored)


def build_student(
    source: ModelName, sizes: NetworkSizes | StudentSizes, tensors: Tensors, provenance: Record | None = None
) -> Backbone:
    """Build a student from its sizes and tensors, in eval mode."""

    return build_loaded(source, partial(new_student, sizes, tensors, provenance), tensors).eval()


def new_student(
    sizes: NetworkSizes | StudentSizes,
    tensors: Tensors,
    provenance: Record | None = None,
    encoder: Encoder | None = None,
) -> Backbone:
    """Build a student into which ``tensors`` can be loaded."""
    student: Backbone
    if isinstance(sizes, StudentSizes):
        student = Student(encoder or build_encoder(sizes.encoder), sizes.student, provenance)
    else:
        with torch.device("cpu"):  # torch._dynamo cannot be imported on the meta device
            from d2v_composer.models.timm_network import TimmStudent  # timm takes seconds to import

        student = TimmStudent(sizes.network, provenance)
    info = sizes.embedding
    if info.raw not in student.raw_names:
        raise ValueError(f"its config names the embedding {info.raw!r}, which the model does not have")
    if (info.made_by != "raw") != (has_alignment := "alignment.weight" in tensors):
        raise ValueError(
            f"it {'has' if has_alignment else 'lacks'} an alignment's tensors, but its config says otherwise"
        )
    student.raw_embedding = info.raw
    if info.made_by != "raw":
        weight, bias = (torch.empty(tensors[f"alignment.{name}"].shape) for name in ("weight", "bias"))
        student.alignment = Alignment(student.alignment_inputs, weight, bias, info.of, info.made_by, info.space)
    return student


def from_timm(source: ModelName, sizes: NetworkSizes, tensors: Tensors, is_classifier: bool) -> Tensors:
    """Return the tensors of an exported timm student under this package's names."""
    from d2v_composer.models.timm_network import classifier_prefixes, create_network  # timm takes seconds to import

    last = dict[str, Tensor]()
    if is_classifier or sizes.embedding.made_by != "raw":
        with reading(source):
            prefix, *_ = classifier_prefixes(sizes.network)
            weight, bias = tensors[f"{prefix}weight"], tensors[f"{prefix}bias"]
            name = "head" if is_classifier else "alignment"
            last = {f"{name}.weight": weight.flatten(1), f"{name}.bias": bias.flatten()}
        check_fits(source, lambda: create_network(sizes.network, num_classes=len(bias))[0], tensors)
        with torch.device("meta"):
            kept = create_network(sizes.network)[0].state_dict()
        tensors = {name: tensor for name, tensor in tensors.items() if name in kept}
    return {sizes.prefix + name: tensor for name, tensor in tensors.items()} | last


def check_timm_outputs(source: ModelName, student: Backbone) -> None:
    """Check that the installed timm computes what a student with a timm encoder computed at its export."""
    config = student.encoder.config
    if isinstance(config, TimmConfig) and config.outputs:
        with reading(source):
            if not is_equal_but_for_rounding(torch.tensor(student.sample_outputs()), torch.tensor(config.outputs)):
                raise ValueError(
                    f"the installed timm gives different results for {config.model} than timm {config.timm!r:.30}, "
                    "with which the student was exported: install that version"
                )


def build_encoder(config: EncoderConfig) -> Encoder:
    """Build a frozen encoder, into which a state dict can be loaded."""
    if type(config) in ENCODERS:
        return ENCODERS[type(config)](config).freeze()
    assert isinstance(config, TimmEncoderConfig)
    with torch.device("cpu"):  # see new_student
        from d2v_composer.models.timm_teacher import TimmEncoder

    return TimmEncoder(config).freeze()


def config_tensor(sizes: Record) -> Tensor:
    """Return a student's sizes as the bytes of their JSON, (N,) uint8."""
    return torch.tensor(list(json.dumps(sizes).encode()), dtype=torch.uint8)
